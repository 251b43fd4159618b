"""The HTTP server: OpenAI's API over an `AsyncEngine`. Start reading at `app.create_app` and `server.run_server`."""
