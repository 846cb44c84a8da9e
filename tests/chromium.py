"""A real browser: Debian's Chromium, told what to do by its DevTools protocol.

In: addresses, JavaScript, sizes, keys.
Out: what a page says, how it looks, and every error in its console.

The protocol is spoken over two pipes, so no port is opened.  Each page has cookies and storage of its own.
"""

import base64
import itertools
import json
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess
from tests.cluster import PATIENCE, wait_until
from tests.services import debian_program

#: Nothing that a browser does for its maker, and nothing that needs a screen.  The sandbox refuses to run as root.
_FLAGS: Final = (
    "--headless=new",
    "--no-first-run",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
    "--mute-audio",
    "--remote-debugging-pipe",
)
#: Brings an element into view and returns its middle.
_MIDDLE: Final = """element => {
  if (!element) return null;
  element.scrollIntoView({block: "center"});
  const {x, y, width, height} = element.getBoundingClientRect();
  return {x: x + width / 2, y: y + height / 2};
}"""
_CODES: Final = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowUp": 38, "ArrowDown": 40}


class BrowserError(RuntimeError):
    """The browser refused a command, or the page's own code failed; the message is the browser's."""


class Chromium(EmbeddedProcess):
    """A browser without a window; a context manager that runs it.  Skips the test where there is no Chromium."""

    def __init__(self) -> None:
        self._program = debian_program("chromium")
        super().__init__("chromium")
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._lock = threading.Lock()
        self._commands: IO[bytes]
        self._reader: threading.Thread

    def page(self, width: int = 1440, height: int = 900) -> "Page":
        """Return a new, empty page of this size in pixels."""
        context = self.call("Target.createBrowserContext", {"disposeOnDetach": True})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        return page

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """Send a command of the protocol and return its result."""
        number = next(self._numbers)
        answers = self._answers[number] = queue.SimpleQueue()
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        with self._lock:
            self._commands.write(json.dumps(message).encode() + b"\0")
            self._commands.flush()
        try:
            answer = answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise BrowserError(f"the browser did not answer {method}: {self._log_tail()}") from None
        finally:
            del self._answers[number]
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    @override
    def launch(self) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._theirs = (theirs_in, theirs_out)
        try:
            super().launch()
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._commands = os.fdopen(ours_out, "wb")
        self._reader = threading.Thread(target=self._read, args=(os.fdopen(ours_in, "rb"),), daemon=True)
        self._reader.start()

    @override
    def close(self) -> None:
        super().close()
        self._reader.join(PATIENCE)
        self._commands.close()

    @override
    def _command(self) -> list[str]:
        theirs_in, theirs_out = self._theirs
        browser = [str(self._program), *_FLAGS, f"--user-data-dir={self.directory / 'profile'}"]
        # The protocol's pipes are the descriptors 3 and 4; only bash moves those above 9 there.
        return ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "chromium", *browser]

    @override
    def _options(self) -> dict[str, Any]:
        return {"pass_fds": self._theirs, "env": os.environ | {"HOME": str(self.directory)}}

    @override
    def _is_ready(self) -> bool:
        return bool(self.call("Browser.getVersion"))

    def _read(self, stream: IO[bytes]) -> None:
        """Hand out what the browser says, until it ends."""
        rest = b""
        with stream:
            while piece := os.read(stream.fileno(), 1 << 20):
                *messages, rest = (rest + piece).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]].put(message)
                    elif page := self._pages.get(message.get("sessionId", "")):
                        page.happened(message["method"], message["params"])


class Page:
    """A page of a browser; made by ``Chromium.page``."""

    def __init__(self, browser: Chromium, session: str, context: str) -> None:
        self._browser = browser
        self._session = session
        self._context = context
        self._loads = 0
        self.errors: list[str] = []  #: What the console shows in red, and exceptions that nothing caught.
        self.responses: list[tuple[int, str]] = []  #: Status and address of each answer of a server.

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send this page a command of the protocol and return its result."""
        return self._browser.call(method, parameters, self._session)

    def open(self, url: str) -> None:
        """Go to an address and wait until the page has loaded."""
        loads = self._loads
        failure = self.call("Page.navigate", url=url).get("errorText")
        if failure:
            raise BrowserError(f"{url}: {failure}")
        wait_until(lambda: self._loads > loads, f"{url} to load")

    def evaluate(self, expression: str) -> Any:
        """Return the value, as JSON has it, of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if details := answer.get("exceptionDetails"):
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, what: str) -> Any:
        """Return the first true value of an expression; a page that is about to go may have none."""

        def value() -> Any:
            try:
                return self.evaluate(expression)
            except BrowserError:
                return None

        return wait_until(value, what)

    def text(self, selector: str = "body") -> str:
        """Return what a reader sees of an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Press the mouse's button over the middle of an element."""
        found = self.evaluate(f"({_MIDDLE})(document.querySelector({json.dumps(selector)}))")
        if found is None:
            raise BrowserError(f"there is no {selector}")
        for type_ in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=type_, button="left", clickCount=1, **found)

    def write(self, text: str) -> None:
        """Put text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key, as ``Enter`` or ``Tab``."""
        code = _CODES.get(key, 0)
        text = {"Enter": "\r", " ": " "}.get(key)
        down: dict[str, Any] = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Give the page this size in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, **features: str) -> None:
        """Say what the user prefers: ``prefer(prefers_color_scheme="dark")``."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a picture (PNG) of the page; ``whole``: also of what is to be scrolled to."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def happened(self, event: str, data: dict[str, Any]) -> None:
        """Note an event of the protocol; called by the browser's thread."""
        match event:
            case "Page.loadEventFired":
                self._loads += 1
            case "Network.responseReceived":
                self.responses.append((data["response"]["status"], data["response"]["url"]))
            case "Runtime.consoleAPICalled" if data["type"] == "error":
                words = (str(argument.get("value", argument.get("description"))) for argument in data["args"])
                self.errors.append(" ".join(words))
            case "Runtime.exceptionThrown":
                details = data["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded" if data["entry"]["level"] == "error":
                self.errors.append(f"{data['entry']['text']} {data['entry'].get('url', '')}".strip())

    def close(self) -> None:
        """Close the page and forget what it has stored."""
        self._browser.call("Target.disposeBrowserContext", {"browserContextId": self._context})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
