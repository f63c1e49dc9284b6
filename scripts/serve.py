"""Serve a model and adapters over it through an OpenAI-compatible HTTP API.

    pip install -e ".[serve]"
    python scripts/serve.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \
        --adapters '{"orders": "out/quickstart/final"}'

Clients connect to http://127.0.0.1:8000/v1; the model's name is that of its directory, or of an adapter. If the environment
variable LITMINI_API_KEY is set, clients must send it. Where a request does not say how to sample, generation_config.json of
the checkpoint or adapter does; without do_sample there, the server is greedy, as scripts/generate.py always is by default.
"""

from dataclasses import dataclass, field

from litmini.cli import command
from litmini.config.generate import ModelConfig
from litmini.errors import UserError, check


@dataclass(kw_only=True)
class ServeConfig(ModelConfig):
    """Settings of serve.py."""

    adapters: dict[str, str] = field(default_factory=dict)
    """Further models: name -> adapter directory. They use the weights of the base in memory."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 listens at all addresses."""
    port: int = 8000
    """Port to listen at."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names, beside that of --host, by which clients may call this server: that of a proxy, say."""
    max_batch: int = 8
    """Maximum requests in one batch; others wait."""
    max_queue: int = 64
    """Maximum waiting requests; others are refused with status 429."""
    max_connections: int = 256
    """Maximum connections; others are refused with status 503."""
    idle_seconds: float = 10.0
    """Seconds after which a connection without requests is closed."""
    write_seconds: float = 20.0
    """Seconds after which a connection is closed whose client does not read the response."""
    max_new_tokens: int = 1024
    """Longest completion in tokens."""
    max_context: int = 8192
    """Maximum tokens of prompt and completion together, at most the model's context."""
    max_body_mib: float = 1.0
    """Maximum size of a request in MiB; all connections together can take max_connections times that."""
    max_output_mib: float = 8.0
    """Maximum MiB of log-probabilities that are kept for one client until it receives them."""

    def __post_init__(self) -> None:
        sizes = (
            "max_batch",
            "max_queue",
            "max_connections",
            "idle_seconds",
            "write_seconds",
            "max_new_tokens",
            "max_context",
            "max_body_mib",
            "max_output_mib",
        )
        check("", self, **{name: getattr(self, name) > 0 for name in sizes}, port=0 <= self.port < 2**16)
        if self.adapters and self.adapter_dir is not None:
            raise UserError("expected --adapter_dir DIR, or --adapters '{NAME: DIR}', not both.")
        if self.adapters and self.compile:
            raise UserError("--compile goes with one model, not with --adapters.")


def main(config: ServeConfig) -> None:
    import logging
    import os
    import socket
    import sys
    from pathlib import Path

    try:
        import uvicorn

        from litmini.serving.access import AllowedHosts
        from litmini.serving.connections import connection_type
        from litmini.serving.log import BoundedLog
        from litmini.serving.server import Limits, Server, make_app
    except ImportError as error:
        raise UserError(f'serving needs {error.name}: pip install -e ".[serve]"') from None
    from litmini.generation.defaults import describe_sampling, sampling_defaults
    from litmini.generation.generate import open_model
    from litmini.generation.multi_adapter import MultiLoRA
    from litmini.generation.packed_linear import pack_linears
    from litmini.system import has_colors
    from litmini.tokenizer import Tokenizer

    key = os.environ.get("LITMINI_API_KEY") or None
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen at {config.host}:{config.port}: {error}. Give another --port.") from None
        model, tokenizer = open_model(config)
        tokenizers = {Path(config.adapter_dir or config.checkpoint_dir).resolve().name: tokenizer}
        directories = {name: [config.adapter_dir or config.checkpoint_dir] for name in tokenizers} | {
            name: [directory] for name, directory in config.adapters.items()
        }
        defaults = {n: sampling_defaults(*own, config.checkpoint_dir) for n, own in directories.items()}
        multi_lora = MultiLoRA(model) if config.adapters else None
        if multi_lora is None:
            pack_linears(model)
        for name, directory in config.adapters.items():
            if name in tokenizers:
                raise UserError(f"adapter {name} has the name of the model itself; give it another.")
            assert multi_lora is not None
            multi_lora.add(name, directory)
            own = (Path(directory) / "tokenizer.json").is_file() and config.chat_template == "auto"
            tokenizers[name] = Tokenizer(directory, template_kwargs=config.template_kwargs) if own else tokenizer
            tokenizers[name].special_tokens_in_text = config.special_tokens_in_text
        limits = Limits(
            config.max_batch,
            config.max_queue,
            config.max_new_tokens,
            config.max_context,
            int(config.max_body_mib * 2**20),
            max_output_bytes=int(config.max_output_mib * 2**20),
        )
        hosts = AllowedHosts(config.host, config.allowed_hosts)
        listener.listen()  # clients that read the next line may connect at once
        port = listener.getsockname()[1]
        print(f"{', '.join(tokenizers)} at http://{config.host}:{port}/v1", file=sys.stderr, flush=True)
        for name, sampling in defaults.items():
            print(f"{name}: {describe_sampling(sampling)} where a request does not say", file=sys.stderr, flush=True)
        if key is None and config.host not in ("127.0.0.1", "localhost", "::1"):
            print("warning: anyone who can reach this address can use it; set LITMINI_API_KEY.", file=sys.stderr)
        settings = uvicorn.Config(
            make_app(Server(model, tokenizers, limits, key, multi_lora, hosts, defaults)),
            log_level="warning",
            http=connection_type(config.max_connections, config.idle_seconds, config.write_seconds),
            ws="none",
            use_colors=has_colors(sys.stderr),
            timeout_graceful_shutdown=5,
        )
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addFilter(BoundedLog())
        uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    command(main, ServeConfig, __doc__)
