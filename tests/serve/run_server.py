"""`run_server.py ENGINE CONFIG`: serve. ENGINE: "real" or a function of fake_engine; CONFIG: JSON."""

import json
import sys

import fake_engine

from gemcutter.config import EngineConfig
from gemcutter.serve.app import serve

if __name__ == "__main__":
    engine, config = sys.argv[1], EngineConfig(**json.loads(sys.argv[2]))
    sys.exit(serve(config) if engine == "real" else serve(config, getattr(fake_engine, engine)))
