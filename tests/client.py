"""A page's connection to a running ComfyUI: queues graphs, writes down what it is told, cancels where it is asked to.

Run as a script by ComfyUI's own Python, which has a client for websockets; `jobs.json` is a list of
{"graph": ..., "cancel_at": [node, value] or null, "preview_method": ...}. Prints a list of what came of each:
{"status", "events": [[seconds, type, node, value]], "previews": sizes, "seconds_to_stop", "messages", "outputs"}.
"""

from __future__ import annotations

import asyncio
import io
import json
import struct
import sys
import time
from pathlib import Path

import aiohttp
from PIL import Image

ENDS = ("execution_success", "execution_error", "execution_interrupted")
PREVIEW, PREVIEW_WITH_METADATA, TEXT = 1, 4, 3


class Client:
    def __init__(self, session, socket, url: str) -> None:
        self.session, self.socket, self.url = session, socket, url

    async def run(self, job: dict) -> dict:
        extra = {"preview_method": job["preview_method"]} if job.get("preview_method") else {}
        body = {"prompt": job["graph"], "client_id": "tests", "extra_data": extra}
        async with self.session.post(f"{self.url}/prompt", json=body) as answer:
            queued = await answer.json()
        if "prompt_id" not in queued:
            return {"status": "refused", "errors": queued}
        found = {"events": [], "previews": [], "texts": [], "seconds_to_stop": None}
        begin, cancelled = time.monotonic(), None
        async for message in self.socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                self.binary(message.data, found)
                continue
            event = json.loads(message.data)
            data = event["data"]
            if data.get("prompt_id") not in (None, queued["prompt_id"]):
                continue
            seconds = round(time.monotonic() - begin, 3)
            found["events"].append([seconds, event["type"], data.get("node"), data.get("value")])
            wanted = job.get("cancel_at")
            if (
                wanted
                and not cancelled
                and event["type"] == "progress"
                and data["node"] == wanted[0]
                and data["value"] >= wanted[1]
            ):
                cancelled = time.monotonic()
                await self.session.post(f"{self.url}/interrupt")
            if event["type"] in ENDS:
                if cancelled:
                    found["seconds_to_stop"] = round(time.monotonic() - cancelled, 3)
                found["status"] = event["type"]
                found["error"] = data.get("exception_message")
                break
        history = await self.history(queued["prompt_id"])
        cached = [
            data["nodes"] for kind, data in history.get("status", {}).get("messages", []) if kind == "execution_cached"
        ]
        return {**found, "outputs": history.get("outputs", {}), "cached": cached[0] if cached else []}

    async def history(self, prompt: str) -> dict:
        """A run's entry, which is written shortly after the run's end is told."""
        while True:
            async with self.session.get(f"{self.url}/history/{prompt}") as answer:
                found = await answer.json()
            if prompt in found:
                return found[prompt]
            await asyncio.sleep(0.02)

    @staticmethod
    def binary(data: bytes, found: dict) -> None:
        (kind,) = struct.unpack(">I", data[:4])
        if kind == TEXT:
            (length,) = struct.unpack(">I", data[4:8])
            found["texts"].append([data[8 : 8 + length].decode(), data[8 + length :].decode()])
        elif kind == PREVIEW:
            found["previews"].append([None, *Image.open(io.BytesIO(data[8:])).size])
        elif kind == PREVIEW_WITH_METADATA:
            (length,) = struct.unpack(">I", data[4:8])
            node = json.loads(data[8 : 8 + length])["node_id"]
            found["previews"].append([node, *Image.open(io.BytesIO(data[8 + length :])).size])


async def main(url: str, jobs: list[dict]) -> list[dict]:
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{url}/ws?clientId=tests", max_msg_size=0) as socket:
            flags = {"supports_preview_metadata": True, "supports_progress_text_metadata": False}
            await socket.send_json({"type": "feature_flags", "data": flags})
            client = Client(session, socket, url)
            return [await client.run(job) for job in jobs]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))))
