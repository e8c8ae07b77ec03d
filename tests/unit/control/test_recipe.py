from __future__ import annotations

from pathlib import Path

import pytest

from cloudlet.control.recipe import check_app, read_recipe
from cloudlet.errors import UsageError
from cloudlet.model import GuestPort
from cloudlet.overlay.root import App


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('summary: "a\\tb"', "app.summary"),
        ('version: "\\e[2J"', "app.version"),
        ('ports: [{port: 1, name: "\\u202e"}]', "app.ports.name"),
        (f'ready: "serial:{"a" * 1100}"', "app.ready"),
    ],
)
def test_what_no_reader_would_take_is_refused_at_once(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: hello\n{text}\n")
    with pytest.raises(UsageError, match=says):
        read_recipe(tmp_path)


@pytest.mark.parametrize("app", [App("a\nb"), App("x" * 129), App("x", ports=(GuestPort(0),))])
def test_an_app_made_by_hand_is_checked_too(app: App) -> None:
    with pytest.raises(UsageError):
        check_app(app)


def test_a_good_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: hello\nsummary: Grüße\nports: [{port: 80, name: web}]\n")
    assert read_recipe(tmp_path).app().summary == "Grüße"
