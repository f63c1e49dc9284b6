"""A server that speaks OpenAI's protocol, and a client of such servers."""
