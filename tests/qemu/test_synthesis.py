"""The main job, on a real QEMU: an overlay is made by a recipe and synthesised."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from cloudlet.control.publishing import create_overlay
from cloudlet.control.site import Site
from cloudlet.control.synthesis import synthesise
from cloudlet.store.bases import Base
from cloudlet.transfer.source import open_source

pytestmark = pytest.mark.qemu


def test_an_overlay_made_by_a_recipe_answers(site: Site, quick_base: Base, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    (recipe / "files").mkdir(parents=True)
    (recipe / "files" / "word").write_text("from the recipe")
    (recipe / "recipe.yaml").write_text(
        "name: hello\nfiles: [{from: files/, to: /www/hello/}]\nrun: ['test -s /www/hello/word']\n"
        "ports: [{port: 8080}]\nready: 'http:8080/'\n"
    )
    output = tmp_path / "hello.overlay"
    create_overlay(
        site, quick_base, recipe, output, build_folder=tmp_path / "build", sign=site.keys.signer(), say=print
    )
    with open_source(str(output), None) as source, synthesise(site, source) as made:
        assert made.signed_by == "default"
        assert made.renewed
        status, text = made.instance.agent.run(["/bin/cat", "/www/hello/word"], timeout=30)
        assert (status, text) == (0, b"from the recipe")
        with urllib.request.urlopen(made.instance.endpoints[0].url, timeout=10) as answer:
            assert answer.status == 200
