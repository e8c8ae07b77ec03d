"""Every operation of the API on one page. Routes, checks, policy, documents and tests are made from it."""

from __future__ import annotations

from oslo_policy.policy import RuleDefault

from cloudlet.api.handlers import (
    apps,
    bases,
    events,
    handoffs,
    instances,
    operations,
    overlays,
    peer,
    peers,
    site,
    webhooks,
)
from cloudlet.api.operation import Operation
from cloudlet.api.policy import (
    ADMIN,
    ANYBODY,
    MEMBER,
    OWNER,
    PEER,
    PERSONAS,
    PUBLISHER,
    READER,
    VISIBLE,
    rules,
)
from cloudlet.store.rows import APPS, BASES, HANDOFFS, INSTANCES, OPERATIONS, OVERLAYS, PEERS, WEBHOOKS

_BYTES, _TEXT = "application/octet-stream", "text/plain"

# fmt: off
# ruff: noqa: E501 (a table)
TABLE: tuple[Operation, ...] = (
    Operation("GET",    "/",                                  site.versions,          ANYBODY, public=True),
    Operation("GET",    "/v1",                                site.version,           ANYBODY, public=True),
    Operation("GET",    "/v1/openapi.json",                   site.openapi,           ANYBODY, public=True),
    Operation("GET",    "/healthcheck",                       site.healthcheck,       ANYBODY, status=204, public=True),
    Operation("GET",    "/metrics",                           site.metrics,           ANYBODY, public=True, media=_TEXT),
    Operation("GET",    "/v1/cloudlets/self",                 site.show,              READER),
    Operation("PATCH",  "/v1/cloudlets/self",                 site.update,            ADMIN),
    Operation("POST",   "/v1/cloudlets/self/drain",           site.drain,             ADMIN,   status=202),

    Operation("GET",    "/v1/bases",                          bases.list,             READER),
    Operation("POST",   "/v1/bases",                          bases.create,           PUBLISHER, status=201, statuses=(202,)),
    Operation("GET",    "/v1/bases/{base_id}",                bases.show,             READER,  BASES),
    Operation("DELETE", "/v1/bases/{base_id}",                bases.delete,           ADMIN,   BASES, status=204),
    Operation("PUT",    "/v1/bases/{base_id}/file",           bases.upload,           OWNER,   BASES, status=202),
    Operation("HEAD",   "/v1/bases/{base_id}/file",           bases.upload_offset,    OWNER,   BASES),
    Operation("GET",    "/v1/bases/{base_id}/file",           bases.download,         READER,  BASES, statuses=(206,), media=_BYTES),

    Operation("GET",    "/v1/overlays",                       overlays.list,          READER),
    Operation("POST",   "/v1/overlays",                       overlays.create,        MEMBER,  status=201),
    Operation("GET",    "/v1/overlays/{overlay_id}",          overlays.show,          VISIBLE, OVERLAYS),
    Operation("DELETE", "/v1/overlays/{overlay_id}",          overlays.delete,        OWNER,   OVERLAYS, status=204),
    Operation("PUT",    "/v1/overlays/{overlay_id}/file",     overlays.upload,        OWNER,   OVERLAYS),
    Operation("HEAD",   "/v1/overlays/{overlay_id}/file",     overlays.upload_offset, VISIBLE, OVERLAYS),
    Operation("GET",    "/v1/overlays/{overlay_id}/file",     overlays.download,      VISIBLE, OVERLAYS, statuses=(206,), media=_BYTES),

    Operation("GET",    "/v1/apps",                           apps.list,              READER),
    Operation("POST",   "/v1/apps",                           apps.create,            PUBLISHER, status=201),
    Operation("GET",    "/v1/apps/{app_id}",                  apps.show,              VISIBLE, APPS),
    Operation("PATCH",  "/v1/apps/{app_id}",                  apps.update,            OWNER,   APPS),
    Operation("DELETE", "/v1/apps/{app_id}",                  apps.delete,            OWNER,   APPS, status=204),
    Operation("POST",   "/v1/apps/{app_id}/prestage",         apps.prestage,          OWNER,   APPS, status=202),

    Operation("GET",    "/v1/instances",                      instances.list,         READER),
    Operation("POST",   "/v1/instances",                      instances.create,       MEMBER,  status=202),
    Operation("GET",    "/v1/instances/{instance_id}",        instances.show,         VISIBLE, INSTANCES),
    Operation("PATCH",  "/v1/instances/{instance_id}",        instances.update,       OWNER,   INSTANCES),
    Operation("DELETE", "/v1/instances/{instance_id}",        instances.delete,       OWNER,   INSTANCES, status=202),
    Operation("POST",   "/v1/instances/{instance_id}/pause",  instances.pause,        OWNER,   INSTANCES),
    Operation("POST",   "/v1/instances/{instance_id}/resume", instances.resume,       OWNER,   INSTANCES, statuses=(202,)),
    Operation("POST",   "/v1/instances/{instance_id}/suspend", instances.suspend,     OWNER,   INSTANCES, status=202),
    Operation("POST",   "/v1/instances/{instance_id}/overlay", instances.save,        OWNER,   INSTANCES, status=202),
    Operation("GET",    "/v1/instances/{instance_id}/console-log", instances.console_log, OWNER, INSTANCES, media=_TEXT),

    Operation("GET",    "/v1/operations",                     operations.list,        READER),
    Operation("GET",    "/v1/operations/{operation_id}",      operations.show,        VISIBLE, OPERATIONS),
    Operation("DELETE", "/v1/operations/{operation_id}",      operations.cancel,      OWNER,   OPERATIONS, status=202),

    Operation("GET",    "/v1/events",                         events.list,            READER),

    Operation("GET",    "/v1/webhooks",                       webhooks.list,          PUBLISHER),
    Operation("POST",   "/v1/webhooks",                       webhooks.create,        PUBLISHER, status=201),
    Operation("GET",    "/v1/webhooks/{webhook_id}",          webhooks.show,          OWNER,   WEBHOOKS),
    Operation("DELETE", "/v1/webhooks/{webhook_id}",          webhooks.delete,        OWNER,   WEBHOOKS, status=204),

    Operation("GET",    "/v1/handoffs",                       handoffs.list,          READER),
    Operation("POST",   "/v1/handoffs",                       handoffs.create,        MEMBER,  status=202),
    Operation("GET",    "/v1/handoffs/{handoff_id}",          handoffs.show,          VISIBLE, HANDOFFS),
    Operation("DELETE", "/v1/handoffs/{handoff_id}",          handoffs.cancel,        OWNER,   HANDOFFS, status=202),
    Operation("POST",   "/v1/handoffs/{handoff_id}/resolve",  handoffs.resolve,       ADMIN,   HANDOFFS, statuses=(202,)),

    Operation("GET",    "/v1/peers",                          peers.list,             ADMIN),
    Operation("POST",   "/v1/peers",                          peers.create,           ADMIN,   status=201),
    Operation("GET",    "/v1/peers/{peer_id}",                peers.show,             ADMIN,   PEERS),
    Operation("PATCH",  "/v1/peers/{peer_id}",                peers.update,           ADMIN,   PEERS),
    Operation("DELETE", "/v1/peers/{peer_id}",                peers.delete,           ADMIN,   PEERS, status=204),
    Operation("POST",   "/v1/peers/{peer_id}/refresh",        peers.refresh,          ADMIN,   PEERS),

    Operation("GET",    "/v1/peer",                           peer.description,       ANYBODY, public=True),
    Operation("GET",    "/v1/peer/capabilities",              peer.capabilities,      PEER),
    Operation("POST",   "/v1/peer/handoffs",                  peer.offer,             PEER,    status=202),
    Operation("GET",    "/v1/peer/handoffs/{handoff_id}",     peer.state,             PEER,    HANDOFFS),
    Operation("DELETE", "/v1/peer/handoffs/{handoff_id}",     peer.drop,              PEER,    HANDOFFS),
    Operation("GET",    "/v1/peer/handoffs/{handoff_id}/wanted", peer.wanted,           PEER,    HANDOFFS),
    Operation("PUT",    "/v1/peer/handoffs/{handoff_id}/records", peer.records,       PEER,    HANDOFFS),
    Operation("POST",   "/v1/peer/handoffs/{handoff_id}/commit", peer.commit,         PEER,    HANDOFFS),
)
# fmt: on
PEERS_TABLE = tuple(operation for operation in TABLE if operation.at_peers_door)
"""What is served where only other cloudlets come."""


def list_rules() -> list[RuleDefault]:
    """All rules of policy, for oslopolicy-sample-generator."""
    return [*PERSONAS, *rules(TABLE)]
