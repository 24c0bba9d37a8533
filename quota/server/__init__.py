"""An OpenAI-compatible HTTP server over the engine. Needs the `serve` extra: fastapi, uvicorn, prometheus-client."""
