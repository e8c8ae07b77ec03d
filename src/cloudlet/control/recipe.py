"""A recipe: a folder with ``recipe.yaml`` and files, from which an overlay is made.

The model below is the schema: what does not validate is refused with the place that is wrong, and
``cloudlet overlay recipe schema`` prints it as JSON Schema for editors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cloudlet.errors import CloudletError, IntegrityError, NotFoundError, UsageError
from cloudlet.model import GuestPort, Readiness
from cloudlet.overlay.root import App, Publish

FILE = "recipe.yaml"
BUILD_PREFIX = "build:"


def _readiness(text: str) -> str:
    try:
        Readiness.parse(text)
    except CloudletError as error:
        raise ValueError(str(error)) from error
    return text


def _guest_path(text: str) -> str:
    if not text.startswith("/") or ".." in Path(text).parts:
        raise ValueError("must be an absolute path in the guest without ..")
    return text


def _recipe_path(text: str) -> str:
    plain = text.removeprefix(BUILD_PREFIX)
    if plain.startswith("/") or ".." in Path(plain).parts:
        raise ValueError("must be a path in the recipe's folder without ..")
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Files(_Strict):
    """Files of the recipe that are put into the guest."""

    source: Annotated[str, AfterValidator(_recipe_path)] = Field(
        alias="from",
        description="A file or folder of the recipe; build:NAME is one that 'prepare' made.",
    )
    target: Annotated[str, AfterValidator(_guest_path)] = Field(
        alias="to", description="Where it goes in the guest; a folder's content goes into this folder."
    )


class Port(_Strict):
    """A TCP port on which the app listens."""

    port: int = Field(ge=1, le=65535)
    name: str = Field(default="", max_length=128, pattern=r"^[^\n\r]*$")


class Recipe(_Strict):
    """How an overlay is made from a base."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="The app's name.")
    version: str = Field(default="1", max_length=128, pattern=r"^[^\n\r]*$")
    summary: str = Field(default="", max_length=1000, pattern=r"^[^\n\r]*$")
    prepare: tuple[str, ...] = Field(
        default=(),
        description="Shell commands run on the publisher's machine, in the recipe's folder, before anything "
        "else; CLOUDLET_RECIPE_BUILD names a folder for what they make, kept from one time to the next.",
    )
    files: tuple[Files, ...] = ()
    run: tuple[str, ...] = Field(
        default=(), description="Shell commands run as root in the guest, in order; each must succeed."
    )
    ports: tuple[Port, ...] = ()
    ready: Annotated[str, AfterValidator(_readiness)] = Field(
        default="agent", description="agent, tcp:PORT, http:PORT/PATH or serial:REGEX."
    )
    warm_up: tuple[str, ...] = Field(
        default=(),
        alias="warm-up",
        description="Shell commands run on the publisher's machine, in the recipe's folder, against a trial "
        "of the finished app: the first requests that real users will make. CLOUDLET_ENDPOINT is the URL of "
        "its first port. The pages that they touch are put at the front of the overlay.",
    )
    publish: Publish = Field(
        default=Publish.READY,
        description="When the endpoint is given out: once its identity is its own, or once it answers.",
    )

    def app(self) -> App:
        """The recipe's app as it stands in the overlay."""
        return App(
            name=self.name,
            version=self.version,
            summary=self.summary,
            ports=tuple(GuestPort(port.port, port.name) for port in self.ports),
            ready=Readiness.parse(self.ready),
            publish=self.publish,
        )


def read_recipe(folder: Path) -> Recipe:
    """The recipe in a folder.

    :raises UsageError: ``recipe.yaml`` is not valid; the message names each place that is wrong.
    """
    path = folder / FILE
    try:
        recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        check_app(recipe.app())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{path} is not there", hint="a recipe is a folder with recipe.yaml") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{_place(problem['loc'])}: {problem['msg']}" for problem in error.errors())
        raise UsageError(f"{path}: {wrong}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}") from error
    return recipe


def check_app(app: App) -> None:
    """Whether an overlay can say this of its app; asked before the work, not after.

    :raises UsageError: no reader would take it.
    """
    try:
        app.check()
    except IntegrityError as error:
        raise UsageError(error.message) from error


def schema() -> dict[str, Any]:
    """The JSON Schema of ``recipe.yaml``."""
    return Recipe.model_json_schema(by_alias=True)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "the document"
