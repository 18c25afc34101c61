"""ComfyUI's page in a real headless browser for the tests: opening it, and using and judging it as a person would."""

from __future__ import annotations

import json
import os
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from comfyui import Server

HOW = "install Chromium or Chrome, run `playwright install chromium`, or set CHROMIUM_PATH to one"
PATH_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
SIZE = {"width": 1400, "height": 800}
LOADING = 120_000  # ms: the page is nearly a thousand files, and the machine may be busy

# A user who has seen the welcome, and has nothing over the graph. Text is drawn however small the graph has become.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Window.UnloadConfirmation": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}

_READY = """() => {
  const { canvas, api, extensionManager } = window.app ?? {};
  return canvas && api && extensionManager?.workflow?.activeWorkflow?.changeTracker && !extensionManager.spinner;
}"""

# Functions of the page that the rest is written with.
_TOOLS = """() => {
  const nodes = (graph) => graph.nodes.flatMap((node) => [node, ...(node.subgraph ? nodes(node.subgraph) : [])]);
  const known = (type) => type in LiteGraph.registered_node_types;
  const name = (node) => `node ${node.id}, ${node.type}`;
  const painted = (canvas) => {
    const blank = document.createElement("canvas");
    [blank.width, blank.height] = [canvas.width, canvas.height];
    return canvas.width > 0 && canvas.height > 0 && canvas.toDataURL() !== blank.toDataURL();
  };
  const picture = (element) =>
    (element instanceof HTMLImageElement && element.complete && element.naturalWidth > 0) ||
    (element instanceof HTMLCanvasElement && painted(element));
  const elements = (node) =>
    (node.widgets ?? []).flatMap(({ element }) => (element ? [element, ...element.querySelectorAll("*")] : []));
  window.tests = {
    ended: new Set(),
    missing: () => nodes(app.graph).filter((node) => !known(node.type)).map(name),
    red: () => nodes(app.graph).filter((node) => node.has_errors).map(name),
    pictured: (types) => nodes(app.graph)
      .filter((node) => types.includes(node.type) && [...(node.imgs ?? []), ...elements(node)].some(picture)).map(name),
    open: (selector) => [...document.querySelectorAll(selector)]
      .filter((element) => element.checkVisibility() && element.innerText.trim())
      .map((element) => element.innerText.replace(/\\s+/g, " ").trim()),
    fit({ width, height }) {
      const title = LiteGraph.NODE_TITLE_HEIGHT;
      const boxes = [
        ...app.graph.nodes.map(({ pos, size, flags }) =>
          [pos[0], pos[1] - title, pos[0] + size[0], pos[1] + (flags.collapsed ? 0 : size[1])]),
        ...app.graph.groups.map(({ pos, size }) => [pos[0], pos[1], pos[0] + size[0], pos[1] + size[1]]),
      ];
      const edge = (side, of) => of(...boxes.map((box) => box[side]));
      const margin = 40;  // also holds the badges above the nodes
      const [left, top] = [edge(0, Math.min) - margin, edge(1, Math.min) - margin];
      const [wide, high] = [edge(2, Math.max) + margin - left, edge(3, Math.max) + margin - top];
      const scale = Math.min(1, width / wide, height / high);
      app.canvas.ds.scale = scale;
      app.canvas.ds.offset[0] = -left;
      app.canvas.ds.offset[1] = -top;
      app.canvas.setDirty(true, true);
      return { x: 0, y: 0, width: Math.min(width, wide * scale), height: Math.min(height, high * scale) };
    },
  };
  for (const kind of ["success", "error", "interrupted"])
    app.api.addEventListener(`execution_${kind}`, ({ detail }) => tests.ended.add(detail.prompt_id));
}"""

_LOAD = """async ({ bytes, name, type }) => {
  await app.handleFile(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name, { type }));
}"""

_DIALOGS = "[role=dialog], .comfy-modal, .p-toast-message-error, .p-toast-message-warn"
_ERROR_BOX = "[data-testid=error-overlay]"  # goes away with its workflow


class NotFound(Exception):
    """There is no usable browser; the message says how to provide one."""


@contextmanager
def chromium() -> Iterator:
    """A running Chromium, as Playwright's browser. Raises NotFound."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NotFound(f"Playwright cannot be imported ({error}); pip install playwright") from error
    with sync_playwright() as playwright:
        browser = _launched(playwright.chromium)
        try:
            yield browser
        finally:
            browser.close()


def _launched(kind):
    from playwright.sync_api import Error

    chosen = os.environ.get("CHROMIUM_PATH")
    found = [path for path in map(shutil.which, PATH_NAMES) if path]
    reason = ""
    for path in [chosen] if chosen else [None, *found]:  # None: Playwright's own
        try:
            return kind.launch(executable_path=path)
        except Error as error:
            reason = f"{path or 'its own'}: {error.message.splitlines()[0].removeprefix('BrowserType.launch: ')}"
    raise NotFound(f"Playwright can start no Chromium ({reason}); {HOW}")


class Page:
    """ComfyUI's page. `complaints` holds what the browser's console said of this pack since the last load."""

    def __init__(self, browser, server: Server) -> None:
        self.server = server
        self.complaints: list[str] = []
        self._answers: list = []
        self.page = browser.new_page(viewport=SIZE)
        self.page.set_default_timeout(LOADING)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self._note(f"{error.message}\n{error.stack}"))
        self.page.on("response", self._on_response)
        answer = self.page.request.post(f"{server.url}/settings", data=SETTINGS)
        assert answer.ok, answer.text()
        self.page.goto(server.url, wait_until="domcontentloaded")
        self._wait_for_the_page()

    def load(self, workflow: dict, name: str = "workflow.json") -> None:
        """Load a workflow as a user's drop of the file does. What an earlier one left on the page is cleared away."""
        self.drop(json.dumps(workflow).encode(), name, "application/json")

    def drop(self, data: bytes, name: str, type: str = "") -> None:
        """Let a file fall on the page, cleared as for `load`."""
        if self._open(_DIALOGS):
            self.page.reload(wait_until="domcontentloaded")
            self._wait_for_the_page()
        self.complaints.clear()
        self.page.evaluate(_LOAD, {"bytes": b64encode(data).decode(), "name": name, "type": type})
        self._settle()

    def reload(self) -> None:
        """Reload the page, which opens the workflow again as the page saved it by itself."""
        self._settle()
        count = self.page.evaluate("() => app.graph.nodes.length")
        self.page.reload(wait_until="domcontentloaded")
        self._wait_for_the_page()
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=count)
        self._settle()

    def refresh(self) -> None:
        """Ask the server for new files, as the R key does."""
        self.page.evaluate("() => app.refreshComboInNodes()")

    def missing_models(self) -> dict[str, str]:
        """The files that the page lists as missing models, and the folders that it names for them."""
        details = self.page.locator(f"{_ERROR_BOX} button", has_text="View details")
        rows = self.page.locator("[data-testid=missing-model-importable-rows]")
        details.or_(rows).first.wait_for()
        if details.count():
            details.click()
        name, folder, button = (rows.inner_text().split("\n")[n::3] for n in range(3))
        assert set(button) == {"Download"}, button
        return dict(zip(name, folder, strict=True))

    def download_all(self, hub: Mapping[str, str], folder: Path) -> list[Path]:
        """Press *Download all* beside the missing models; what the browser saves by that, in `folder`.

        hub: where the files that Hugging Face has lie on this machine, by its addresses: it answers with another, too.
        """
        saved = []

        def answer(route) -> None:
            place = hub.get(route.request.url)
            route.fulfill(**dict(status=302, headers={"location": place}) if place else dict(status=404))

        def watch(page) -> None:  # a link opens a tab, which becomes a download
            page.on("download", lambda download: saved.append(download))

        context = self.page.context
        context.route("https://huggingface.co/**", answer)
        context.on("page", watch)
        watch(self.page)
        self.page.locator("[data-testid=missing-model-actions] button").click()
        end = time.monotonic() + 60
        while len(saved) < len(hub) and time.monotonic() < end:
            self.page.wait_for_timeout(100)
        self._settle()  # time for more than there should be
        paths = [folder / download.suggested_filename for download in saved]
        for path, download in zip(paths, saved):
            download.save_as(path)
        return paths

    def graph(self) -> dict:
        """The workflow as the page would save it."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def missing(self) -> list[str]:
        """The nodes of types that the page does not know."""
        return self.page.evaluate("() => tests.missing()")

    def red(self) -> list[str]:
        """The nodes that the page frames red."""
        return self.page.evaluate("() => tests.red()")

    def dialogs(self) -> list[str]:
        """The texts of dialogs, the error box and warning toasts that are open."""
        return self._open(f"{_DIALOGS}, {_ERROR_BOX}")

    def problems(self) -> list[str]:
        """All that a user, or the developer of the pack, would see to be wrong."""
        found = {"missing": self.missing(), "red": self.red(), "dialog": self.dialogs(), "console": self.complaints}
        return [f"{kind}: {text}" for kind, texts in found.items() for text in texts]

    def pictured(self, *kinds: str, count: int = 1, seconds: float = 30) -> list[str]:
        """The nodes of some types that show a picture, as soon as they are `count` or the time is over."""
        self._fit()  # nodes out of view load no picture
        end = time.monotonic() + seconds
        while True:
            found = sorted(self.page.evaluate("kinds => tests.pictured(kinds)", kinds))
            if len(found) >= count or time.monotonic() > end:
                return found
            self.page.wait_for_timeout(200)

    def run(self, seconds: float = 300) -> dict[str, str]:
        """Queue the workflow as the Run button does and wait for its end; errors by node, none after a success."""
        self._answers.clear()
        self.page.evaluate("() => app.queuePrompt(0)")
        if not self._answers:
            return {"": f"the page queued nothing: {self.problems()}"}
        answer = self._answers[-1].json()
        refused = {node: _refusal(errors) for node, errors in (answer.get("node_errors") or {}).items()}
        if "prompt_id" not in answer:
            return refused or {"": answer["error"]["message"]}
        errors = refused | self._end_of(answer["prompt_id"], seconds)
        self.page.wait_for_function("id => tests.ended.has(id)", arg=answer["prompt_id"])
        self._settle()
        return errors

    def screenshot(self, path: Path) -> None:
        """Save a picture of the graph alone, at most as large as the page, never enlarged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fit()  # pictures load once in view
        self._focus(True)
        clip = self._fit()
        self.page.screenshot(path=path, clip=clip, style=".no-drag.fixed, .p-toast {display: none !important}")
        self._focus(False)

    def _wait_for_the_page(self) -> None:
        self.page.wait_for_function(_READY)
        self.page.evaluate(_TOOLS)

    def _settle(self, milliseconds: int = 700) -> None:
        """Time for what the page does by itself after a change: checks of models and pictures, saving a draft."""
        self.page.wait_for_timeout(milliseconds)

    def _open(self, selector: str) -> list[str]:
        return self.page.evaluate("selector => tests.open(selector)", selector)

    def _fit(self) -> dict:
        """The graph fitted to the page; the part of the page that it takes."""
        clip = self.page.evaluate("size => tests.fit(size)", SIZE)
        self._settle(300)
        return clip

    def _focus(self, on: bool) -> None:
        self.page.evaluate("on => { app.extensionManager.focusMode = on }", on)
        self._settle()

    def _end_of(self, prompt: str, seconds: float) -> dict[str, str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.server.get(f"/history/{prompt}")
            if history:
                return _errors(history[prompt]["status"])
            self.page.wait_for_timeout(100)
        raise RuntimeError(f"the workflow was not done after {seconds} s:\n{self.server.log[-3000:]}")

    def _on_console(self, message) -> None:
        if message.type == "error":
            self._note(f"{message.text} ({message.location['url']})")

    def _on_response(self, response) -> None:
        if response.request.method == "POST" and response.url.endswith("/prompt"):
            self._answers.append(response)

    def _note(self, text: str) -> None:
        # Blocked by the page's policy: its own look at the addresses that a workflow gives for its models.
        if "varedit" in text.lower() and "Content Security Policy" not in text:
            self.complaints.append(text)


def _refusal(errors: dict) -> str:
    return "; ".join(f"{error['message']}: {error['details']}" for error in errors["errors"])


def _errors(status: dict) -> dict[str, str]:
    if status["status_str"] == "success":
        return {}
    failures = [event for kind, event in status["messages"] if kind == "execution_error"]
    return {event["node_id"]: event["exception_message"].strip() for event in failures} or {"": status["status_str"]}
