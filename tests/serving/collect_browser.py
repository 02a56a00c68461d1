"""A browser without JavaScript: it keeps cookies, follows redirects, and sends the forms of the page before it."""

from __future__ import annotations

import asyncio
from html.parser import HTMLParser

import httpx


class Forms(HTMLParser):
    """The forms of a page: their fields and buttons, by the address that they are sent to; and its visible text."""

    def __init__(self, page: str):
        super().__init__()
        self.forms: list[dict[str, object]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        if tag == "form":
            self.forms.append({"action": held["action"], "fields": {}, "buttons": []})
        elif tag == "input" and (held.get("type") != "radio" or "checked" in held):
            self.forms[-1]["fields"][held["name"]] = held.get("value", "")
        elif tag == "textarea":
            self.forms[-1]["fields"][held["name"]] = ""
        elif tag == "button" and "name" in held:
            self.forms[-1]["buttons"].append((held["name"], held["value"]))

    def handle_data(self, data):
        self.text += data


class Browser:
    """One user's browser on an app."""

    def __init__(self, app):
        self._app, self.cookies = app, httpx.Cookies()
        self.response: httpx.Response | None = None

    def request(self, method, path, **kwargs) -> httpx.Response:
        async def go():
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://here", cookies=self.cookies, follow_redirects=True
            ) as client:
                response = await client.request(method, path, **kwargs)
                self.cookies = client.cookies
                return response

        self.response = asyncio.run(go())
        return self.response

    def get(self, path, **kwargs) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    @property
    def page(self) -> Forms:
        return Forms(self.response.text)

    def form(self, action) -> dict[str, str]:
        """The fields of the first form of the page that is sent to an address."""
        return dict(next(form["fields"] for form in self.page.forms if form["action"] == action))

    def send(self, action, **fields) -> httpx.Response:
        """Fills in and sends a form of the page."""
        return self.request("POST", action, data=self.form(action) | fields)
