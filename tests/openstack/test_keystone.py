"""A site in a real Keystone's catalogue: who has a token is who the token says, while it is valid."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from keystoneauth1.identity import v3
from keystoneauth1.session import Session

from tests.openstack.conftest import USERS, Registered, caller, serving_with
from tests.openstack.keystone import REGION, Keystone, copy_of, until
from tests.service.conftest import Caller, Made

CACHE_SECONDS = 2
PUBLIC = ("/", "/v1", "/v1/openapi.json", "/healthcheck", "/metrics")
MANAGE = Path(sys.executable).with_name("cloudlet-manage")


def register(cloud: Keystone, url: str, user: str = "admin", project: str = "admin") -> tuple[int, Any]:
    """Register a site; the exit code, and what was printed."""
    done = subprocess.run(
        [MANAGE, "register", "--url", url, "-f", "json"],
        env=cloud.environment(user, project), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture(scope="module")
def site(
    cloud: Keystone, made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registered]:
    """A site that has been registered, and users with the roles that this brought."""
    folder = tmp_path_factory.mktemp("site")
    with serving_with(cloud, folder, made, hashed, token_cache_time=CACHE_SECONDS) as running:
        status, rows = register(cloud, running.call.url)
        assert status == 0, rows
        assert {row["is"] for row in rows if row["value"] not in ("member", "reader")} == {"made"}
        for name, (project, *roles) in USERS.items():
            cloud.have_user(name, project, *roles)
        yield Registered(cloud, running)


@pytest.fixture
def overlay(site: Registered) -> str:
    """An overlay's row, which is mia's."""
    created = site.adapter().post("/v1/overlays", json={"overlay": {"name": "mine"}})
    assert created.status_code == 201, created.text
    return str(created.json()["overlay"]["id"])


def code(answer: Any) -> str:
    return str(answer.json()["errors"][0]["code"])


def endpoints_of(cloud: Keystone) -> list[dict[str, str]]:
    services = cloud.admin.get("/services", params={"type": "cloudlet"}).json()["services"]
    assert [service["name"] for service in services] == ["cloudlet"]
    found = cloud.admin.get("/endpoints", params={"service_id": services[0]["id"]})
    return list(found.json()["endpoints"])


def test_to_register_again_changes_only_what_is_wrong(site: Registered) -> None:
    wrong = next(each for each in endpoints_of(site.cloud) if each["interface"] == "admin")
    site.cloud.admin.patch(f"/endpoints/{wrong['id']}", json={"endpoint": {"url": "http://127.0.0.1:1"}})
    status, rows = register(site.cloud, site.running.call.url + "/")
    assert status == 0, rows
    is_now = {row["what"] if "endpoint" in row["what"] else row["value"]: row["is"] for row in rows}
    assert is_now.pop("admin endpoint") == "changed"
    assert set(is_now.values()) == {"there already"}
    endpoints = endpoints_of(site.cloud)
    assert sorted(each["interface"] for each in endpoints) == ["admin", "internal", "public"]
    assert {each["url"] for each in endpoints} == {site.running.call.url}
    assert {each["region"] for each in endpoints} == {REGION}


def test_only_an_administrator_may_register(site: Registered) -> None:
    status, said = register(site.cloud, site.running.call.url, "mia", "shop")
    assert status == 4
    assert said.startswith("cloudlet-manage: Keystone: ")


def test_a_client_finds_the_site_in_the_catalogue(site: Registered) -> None:
    found = site.adapter().get_endpoint_data()
    assert found is not None
    assert (found.api_version, found.min_microversion) == ((1, 0), (1, 0))
    assert site.adapter().get("/v1/bases").status_code == 200


def test_a_token_of_another_project_sees_nothing(site: Registered, overlay: str) -> None:
    site.cloud.have_user("mia", "other", "member")
    for stranger in (site.adapter("max", "other"), site.adapter("mia", "other")):
        assert stranger.get("/v1/overlays").json()["overlays"] == []
        answer = stranger.get(f"/v1/overlays/{overlay}")
        assert (answer.status_code, code(answer)) == (404, "cloudlet.overlay.not_found")
    # Who may look in the project does, and so does the provider's operator.
    for seeing in (site.adapter("mia"), site.adapter("rita"), site.adapter("admin", "admin")):
        assert overlay in [found["id"] for found in seeing.get("/v1/overlays").json()["overlays"]]
        assert seeing.get(f"/v1/overlays/{overlay}").status_code == 200
    assert site.adapter("rita").delete(f"/v1/overlays/{overlay}").status_code == 403


def test_roles_decide_who_may_publish(site: Registered) -> None:
    base = {"base": {"name": "a-base"}}
    assert site.adapter("mia").post("/v1/bases", json=base).status_code == 403
    assert site.adapter("paula").post("/v1/bases", json=base).status_code == 201
    # A publisher is a member: registering has told Keystone.
    roles = (
        site.cloud.session("paula", "shop").auth.get_access(site.cloud.session("paula", "shop")).role_names
    )
    assert {"publisher", "member", "reader"} <= set(roles)


def test_a_day_with_tokens(site: Registered, made: Made) -> None:
    app = site.as_("paula").publish(made.overlay)
    mia = site.as_("mia")
    instance = mia.start(app)
    part = mia(
        "GET", f"/v1/overlays/{app['components'][0]['overlay_id']}/file", headers={"Range": "bytes=0-9"}
    )
    assert (part.status_code, part.content) == (206, made.overlay.read_bytes()[:10])
    with mia("GET", "/v1/events?after=0", stream=True, headers={"Accept": "text/event-stream"}) as stream:
        # They come when they come, and are not collected before.
        assert any(line.startswith(b"data: ") for line in stream.iter_lines())
    mia.done(mia.delete(f"/v1/instances/{instance['id']}"))


def test_without_a_token_only_what_is_public_is_there(site: Registered) -> None:
    nobody = site.caller(None)
    for path in PUBLIC:
        assert nobody("GET", path).status_code in (200, 204), path
    answer = nobody("GET", "/v1/bases")
    assert (answer.status_code, code(answer)) == (401, "cloudlet.base.unauthenticated")
    assert answer.headers["WWW-Authenticate"] == f'Keystone uri="{site.cloud.url}"'


@pytest.mark.parametrize("token", ["unknown", "gAAAAABm", "x" * 9000, "two words", "\xe9t\xe9", ""])
def test_what_is_no_token_is_refused(site: Registered, token: str) -> None:
    answer = site.caller(None)("GET", "/v1/bases", headers={"X-Auth-Token": token.encode("latin-1")})
    assert (answer.status_code, code(answer)) == (401, "cloudlet.base.unauthenticated")
    assert site.caller(token.encode("latin-1").decode("latin-1"))("GET", "/v1").status_code == 200


def test_who_a_client_says_it_is_counts_for_nothing(site: Registered) -> None:
    told = {
        "X-Identity-Status": "Confirmed",
        "X-User-Id": "root",
        "X-Project-Id": "shop",
        "X-Roles": "admin",
        "Cloudlet.Unavailable": "yes",
    }
    assert site.caller(None)("GET", "/v1/bases", headers=told).status_code == 401
    assert site.as_("mia")("POST", "/v1/bases", {"base": {"name": "b"}}, headers=told).status_code == 403


def test_a_token_without_a_project_is_refused(site: Registered) -> None:
    answer = site.caller(str(site.cloud.session("mia", None).get_token()))("GET", "/v1/bases")
    assert answer.status_code == 401
    assert "for no project" in answer.json()["errors"][0]["detail"]


def test_a_revoked_token_is_refused_before_the_cache_ends(site: Registered) -> None:
    token = site.cloud.token("mia", "shop")
    mia = site.caller(token)
    assert mia("GET", "/v1/bases").status_code == 200
    site.cloud.revoke(token)
    began = time.monotonic()
    until(lambda: mia("GET", "/v1/bases").status_code == 401)
    assert time.monotonic() - began < CACHE_SECONDS + 1


def test_without_a_cache_it_is_refused_at_once(
    site: Registered, made: Made, hashed: str, tmp_path: Path
) -> None:
    token = site.cloud.token("mia", "shop")
    with serving_with(site.cloud, tmp_path, made, hashed, token_cache_time=0) as running:
        mia = caller(running.call.url, token)
        assert mia("GET", "/v1/bases").status_code == 200
        site.cloud.revoke(token)
        assert mia("GET", "/v1/bases").status_code == 401


def application_credential(site: Registered, **more: object) -> Caller:
    """Mia's application credential, and who uses it."""
    session = site.cloud.session("mia", "shop")
    path = f"{site.cloud.url}/users/{session.get_user_id()}/application_credentials"
    wanted = {"application_credential": {"name": f"made-{time.monotonic_ns()}", **more}}
    made = session.post(path, json=wanted).json()["application_credential"]
    auth = v3.ApplicationCredential(
        site.cloud.url, application_credential_id=made["id"], application_credential_secret=made["secret"]
    )
    return site.caller(str(Session(auth).get_token()))


def test_an_application_credential_works(site: Registered, overlay: str) -> None:
    app = application_credential(site)
    assert overlay in [found["id"] for found in app.get("/v1/overlays")["overlays"]]
    app.delete(f"/v1/overlays/{overlay}")


def test_its_access_rules_hold(site: Registered) -> None:
    rule = {"service": "cloudlet", "method": "GET", "path": "/v1/bases"}
    app = application_credential(site, access_rules=[rule])
    assert app("GET", "/v1/bases").status_code == 200
    assert app("GET", "/v1/apps").status_code == 401
    # The middleware lets whoever calls himself a service pass them, and leaves the refusal to us.
    for token in ("nonsense", site.cloud.token("max", "other")):
        assert app("GET", "/v1/apps", headers={"X-Service-Token": token}).status_code == 401
    service = {"X-Service-Token": site.cloud.token("cloudlet", "service")}
    assert app("GET", "/v1/apps", headers=service).status_code == 200


@pytest.fixture
def mortal(site: Registered, tmp_path: Path) -> Iterator[Keystone]:
    """Another Keystone with the same users, which may be stopped."""
    with copy_of(site.cloud, tmp_path / "keystone") as found:
        yield found


def test_keystone_goes_and_comes_back(mortal: Keystone, made: Made, hashed: str, tmp_path: Path) -> None:
    settings = {"token_cache_time": 300, "http_connect_timeout": 3, "http_request_max_retries": 0}
    with serving_with(mortal, tmp_path, made, hashed, **settings) as running:
        url = running.call.url
        known, unknown = (caller(url, mortal.token("mia", "shop")) for _ in range(2))
        assert known("GET", "/v1/bases").status_code == 200
        with mortal.silent():
            refused_for_now(unknown)
        until(lambda: unknown("GET", "/v1/bases").status_code == 200)
        unknown = caller(url, mortal.token("mia", "shop"))
        mortal.stop()
        refused_for_now(unknown)
        assert known("GET", "/v1/bases").status_code == 200
        mortal.start(OS_TOKEN__EXPIRATION="3")
        until(lambda: unknown("GET", "/v1/bases").status_code == 200)
        expires(caller(url, mortal.token("mia", "shop")), mortal)


def refused_for_now(who: Caller) -> None:
    answer = who("GET", "/v1/bases")
    assert (answer.status_code, code(answer)) == (503, "cloudlet.base.failed")
    assert int(answer.headers["Retry-After"]) > 0
    assert "X-Openstack-Request-Id" in answer.headers
    for path in PUBLIC:
        assert who("GET", path).status_code in (200, 204), path


def expires(who: Caller, cloud: Keystone) -> None:
    """A token that was found valid is refused when it has expired, but for who a service speaks."""
    assert who("GET", "/v1/bases").status_code == 200
    until(lambda: who("GET", "/v1/bases").status_code == 401)
    service = {"X-Service-Token": cloud.token("cloudlet", "service")}
    assert who("GET", "/v1/bases", headers=service).status_code == 200
