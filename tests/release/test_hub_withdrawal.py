"""`forget` and the hub: what was uploaded of a user is asked to go, and what would not go stays to be said."""

from persona_rlhf.common.files import pseudonym
from persona_rlhf.pipeline.forget_user import forget_uploads
from persona_rlhf.release.deletion_records import proof_file, write_proof
from persona_rlhf.release.export import exportable
from persona_rlhf.release.hub import LocalAdapter, repository_uploads, upload, uploads_of
from tests.release.hub_server import Fault


def test_what_was_uploaded_is_deleted_for_one_user_alone(run, hub):
    adapters = [LocalAdapter(*item) for item in exportable(run.path).folders.items()]
    [parcel] = repository_uploads("ada/fleet", adapters, shared=True, per_user=False, revision="main")
    upload(run.path, parcel, False, lambda _: None)
    others = [adapter.user_id for adapter in adapters if adapter.user_id != "ada"]
    assert others
    assert forget_uploads(run.path) == []
    write_proof(proof_file(run.path, pseudonym("ada")), {})
    hub.faults += [Fault(".", 403)] * 3
    [refused] = forget_uploads(run.path)
    assert not refused.done
    assert refused.sentence.startswith("Not deleted from the hub: ")
    assert uploads_of(run.path, pseudonym("ada"))
    hub.faults.clear()
    assert forget_uploads(run.path) == [(True, "ada/fleet: the adapter is deleted")]
    assert uploads_of(run.path, pseudonym("ada")) == []
    assert forget_uploads(run.path) == []
    assert all(uploads_of(run.path, pseudonym(other)) for other in others)
