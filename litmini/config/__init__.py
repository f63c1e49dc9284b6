"""Settings of scripts: dataclasses whose fields are the options. Nothing heavy is imported, so that --help is quick."""
