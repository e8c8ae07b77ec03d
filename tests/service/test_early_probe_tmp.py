from tests.service.test_early_switch import *
import threading, sys
import pytest, glob
@pytest.mark.parametrize("mbit", [10])
def test_probe(sites, mbit):
    here, there = sites
    import urllib.request
    moving = Moving(here, there, bandwidth_mbit=mbit, deadline_seconds=12)
    gaps, stop = [], threading.Event()
    def poll():
        last = time.monotonic()
        while not stop.is_set():
            try:
                urllib.request.urlopen(moving.instance["endpoints"][0]["url"] + "/turn", timeout=30).read()
            except Exception as e:
                time.sleep(0.01); continue
            now = time.monotonic(); gaps.append(now - last); last = now
            time.sleep(0.01)
    t = threading.Thread(target=poll); t.start()
    here.call.done({"operation": moving.operation})
    stop.set(); t.join()
    print(mbit, "gap", sorted(gaps)[-4:], moving.row(here)["statistics"], Path("/proc/loadavg").read_text())
    log = here.settings.keepers_dir / moving.id / "keeper.log"; print(log.read_text() if log.exists() else "nolog")
    tlog = there.settings.keepers_dir / moving.id / "keeper.log"; print(tlog.read_text())
    moving.delete(there)
