"""Serve an adapter over HTTP and call it: what a user does changes the next ranking.

The server is the command `peftrank serve`; a browser shows a page to try it at its address. The
calls are plain JSON, so any language can make them.

    python examples/serve_and_call.py
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from peftrank import load_config, train

WORK = Path(".demo/serve")
QUICK = {"base.quantization": "none", "method.layers": "all", "training.max_steps": 15}
PORT = os.environ.get("PORT", "8765")
URL = f"http://127.0.0.1:{PORT}"
TITLES = ("Zoo welcomes newborn tapir", "Central bank holds rates", "Cup final goes to penalties")


def post(path: str, body: object) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def main() -> None:
    overrides = {**QUICK, "base.name": os.environ.get("BASE", "minilm-l6")}
    train(load_config(domain="news", method="lora", overrides=overrides), output=WORK / "adapters")

    where = ("--store", str(WORK / "adapters"), "--history", f"sqlite:///{WORK}/history.db")
    server = subprocess.Popen([sys.executable, "-m", "peftrank", "serve", *where, "--port", PORT])
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"{URL}/readyz").close()
                break
            except OSError:  # not yet ready
                time.sleep(0.2)
        items = [{"item_id": title, "fields": {"title": title}} for title in TITLES]
        for user, title in (("ada", "Inflation falls again"), ("bob", "Goalkeeper signs")):
            item = {"item_id": title, "fields": {"title": title}}
            post("/v1/events", {"events": [{"user_id": user, "domain": "news", "item": item}]})
            slate = {"user_id": user, "candidates": items}  # its history is what was posted
            (ranking,) = post("/v1/rank", {"slate": slate, "domain": "news"})["rankings"]
            print(f"{user} read {title!r}, then:", *ranking["item_ids"], sep="\n  ", flush=True)
    finally:
        server.terminate()  # it answers first what it has accepted
        server.wait()


if __name__ == "__main__":
    main()
