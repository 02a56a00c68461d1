"""`forget` and the hub: what was uploaded of a user is asked to go, and what would not go stays to be said."""

from persona_rlhf.deletion import withdraw
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.release.export import leaving
from persona_rlhf.release.hub import Adapter, parcels, upload, uploads, uploads_of

from .hub_server import Fault


def test_what_was_uploaded_is_deleted_for_one_user_alone(run, hub):
    adapters = [Adapter(*item) for item in leaving(run.path).folders.items()]
    [parcel] = parcels("ada/fleet", adapters, shared=True, per_user=False, revision="main")
    upload(run.path, parcel, False, lambda _: None)
    others = [adapter.user_id for adapter in adapters if adapter.user_id != "ada"]
    assert others
    assert withdraw(run.path, "nobody") == []
    hub.faults += [Fault(".", 403)] * 3
    [refused] = withdraw(run.path, "ada")
    assert refused.startswith("Not deleted: ")
    assert uploads(run.path, "ada")
    hub.faults.clear()
    assert withdraw(run.path, "ada") == ["ada/fleet: his adapter is deleted"]
    assert uploads_of(run.path, pseudonym("ada")) == []
    assert withdraw(run.path, "ada") == []
    assert all(uploads(run.path, other) for other in others)
