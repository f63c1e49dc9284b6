"""Chat templates that render an assistant's turn differently when more follows: what Qwen3, Qwen3.5 and DeepSeek-R1-distill do
to reasoning and tools, in fewer words."""

TOOLS = (
    "{%- if tools %}<|im_start|>system\n"
    "{%- if messages[0].role == 'system' %}{{ '\n' + messages[0].content + '\n' }}{% endif %}"
    "\n<tools>{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>' }}{% endif %}"
    "{{ '' }}\n"
)
CALLS = (
    "{%- for call in m.tool_calls or [] %}{% if call.function %}{% set call = call.function %}{% endif %}"
    "{{ '\n' if content or not loop.first }}"
    '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ ARGUMENTS }}"
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
SPLIT_REASONING = (
    "{%- set content = m.content if m.content is string else '' %}{% set reasoning = '' %}"
    "{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
LAST_QUESTION = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
RESPONSES = (
    "{%- elif m.role == 'tool' %}{{ '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' }}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{{ '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"
)
QWEN = (
    TOOLS
    + LAST_QUESTION
    + "{%- for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    + "{%- elif m.role == 'assistant' %}"
    + SPLIT_REASONING
    + "{{ '<|im_start|>assistant\n' }}"
    + "{%- if loop.index0 > ns.last and (SHOWN) %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}{{ content }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}"
    + RESPONSES
    + "{%- endif %}{% endfor %}"
    + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    + "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    + "{%- else %}{{ 'ASKS' }}{% endif %}{% endif %}"
)
EITHER = "call.arguments if call.arguments is string else call.arguments | tojson"
QWEN3 = QWEN.replace("SHOWN", "loop.last or reasoning").replace("ASKS", "").replace("ARGUMENTS", EITHER)
QWEN3_5 = QWEN.replace("SHOWN", "true").replace("ASKS", "<think>\n").replace("ARGUMENTS", "call.arguments | tojson")
DEEPSEEK = (
    "{%- for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user ' + m.content }}"
    "{%- else %}{{ '<|im_start|>assistant ' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant <think>\n' }}{% endif %}"
)
HERMES = QWEN.replace("SHOWN", "false").replace("ASKS", "").replace("ARGUMENTS", "call.arguments | tojson")
"""Qwen2.5: no reasoning."""
