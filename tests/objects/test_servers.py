"""The suite of `storage_case` against real object stores, and what only a service can answer."""

import urllib.request

import pytest
from servers import BUCKET, SECRET, USER, SeaweedFS, bucket, free_ports
from storage_case import StorageCase, all_bytes

from rollforward.errors import ConfigError, StorageError
from rollforward.storage import Storage
from rollforward.storage.address import open_storage
from rollforward.storage.listing import listed
from rollforward.storage.objects import ObjectStorage
from rollforward.store.lease import honours_conditions


class TestMoto(StorageCase):
    @pytest.fixture
    def storage(self, moto_url, address, use) -> Storage:
        use(moto_url)
        return open_storage(address)


class TestSeaweedFS(StorageCase):
    @pytest.fixture
    def storage(self, seaweed, address, use) -> Storage:
        use(seaweed.url)
        return open_storage(address)


@pytest.fixture(params=["moto", "seaweedfs"])
def service(request, use) -> str:
    """Each of the services; the environment says how it is reached."""
    url = (
        request.getfixturevalue("moto_url")
        if request.param == "moto"
        else request.getfixturevalue("seaweed").url
    )
    use(url)
    return url


@pytest.mark.usefixtures("service")
def test_of_two_writers_at_the_same_place_the_second_is_refused(address):
    one, other = open_storage(address), open_storage(address)
    first = one.appender("journal/a")
    zombie = other.appender("journal/a")
    first.append([b"mine"])
    with pytest.raises(StorageError, match="another writer was here first") as caught:
        zombie.append([b"late"])
    assert caught.value.hint
    with pytest.raises(StorageError, match="an earlier append failed"):
        zombie.append([b"again"])
    assert all_bytes(one, "journal/a") == b"mine"


@pytest.mark.usefixtures("service")
def test_conditional_writes_let_one_of_several_through(address):
    one, other = open_storage(address), open_storage(address)
    assert honours_conditions(one, one)
    assert one.read_tagged("run.lock") is None
    first = one.put_if("run.lock", b"one", None)
    assert first
    assert other.put_if("run.lock", b"other", None) is None
    second = one.put_if("run.lock", b"one again", first)
    assert second not in (None, first)
    assert other.put_if("run.lock", b"other", first) is None
    assert other.read_tagged("run.lock") == (b"one again", second)
    # Asked once more, since its answer was lost.
    assert one.put_if("run.lock", b"one again", first) == second
    one.remove("run.lock")
    assert one.put_if("run.lock", b"one", second) is None


def test_an_append_whose_answer_was_lost_is_not_taken_for_another_writers(service, address):
    storage = open_storage(address)
    lost = storage.appender("journal/a")
    lost.append([b"frame"])  # it is there, but the trainer was not told, and sends it once more
    again = ObjectStorage(bucket(service, address.removeprefix(f"s3://{BUCKET}/")), address)
    again.create("journal/a+0001-0000000000000000", b"frame")
    assert all_bytes(storage, "journal/a") == b"frame"


@pytest.mark.usefixtures("service")
def test_one_listing_shows_what_a_look_at_each_file_shows(address):
    storage = open_storage(address)
    storage.write("train/rank_0/f", [b"123"])
    storage.write("train/rank_1/f", [b""])
    storage.appender("journal/rank_0/1-0_0.journal").append([b"one"])
    storage.rewrite("journal/rank_0/1-0_0.journal", [b"one"]).append([b"two"])
    seen = listed(storage)
    assert seen is not storage
    for path in (
        "train",
        "train/rank_0",
        "train/rank_0/f",
        "train/rank_1/f",
        "train/rank_2",
        "train/rank_0/g",
    ):
        assert seen.stat(path) == storage.stat(path)
    for folder in ("", "train", "train/rank_0", "journal/rank_0", "nothing"):
        assert seen.scan(folder) == storage.scan(folder)


@pytest.mark.usefixtures("service")
def test_what_a_killed_removal_left_is_listed_as_a_temporary_file_and_goes_with_those(address):
    storage = open_storage(address)
    grown = storage.appender("journal/a")
    grown.append([b"one"])
    grown.append([b"two"])
    storage._remove(["journal/a+0001-0000000000000000"])  # and then it was killed
    assert storage.stat("journal/a") is None
    assert [(entry.name, entry.size) for entry in storage.scan("journal")] == [(".a.00000000.tmp", 3)]
    storage.appender("journal/a").append([b"new"])
    assert all_bytes(storage, "journal/a") == b"new"
    storage.remove("journal/a")
    assert storage.scan("journal") == []


@pytest.mark.usefixtures("service")
def test_a_file_that_is_replaced_while_it_is_read_is_an_error(address):
    storage = open_storage(address)
    storage.write("f", [b"a" * 100_000])
    with storage.open("f") as handle:
        storage.write("f", [b"b" * 100_000])
        with pytest.raises(StorageError, match="replaced"):
            handle.read_into(memoryview(bytearray(10)), 70_000)


def test_an_upload_that_is_given_up_leaves_nothing_in_the_service(moto_url, address, use):
    use(moto_url)

    def broken():
        yield bytes(40 << 20)
        raise RuntimeError("the engine went away")

    with pytest.raises(RuntimeError):
        open_storage(address).write("f", broken())
    with urllib.request.urlopen(f"{moto_url}/{BUCKET}?uploads", timeout=60) as answer:
        assert b"<Upload>" not in answer.read()


def test_a_bucket_that_is_not_there_is_told_at_once(moto_url, use):
    use(moto_url)
    with pytest.raises(StorageError, match=r"listing s3://no-such-bucket/run: 404 .*NoSuchBucket") as caught:
        open_storage("s3://no-such-bucket/run")
    assert "make the bucket" in caught.value.hint


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_and_never_shown(seaweed: SeaweedFS, address, use, name):
    use(seaweed.url, **{name: "wrong-and-private"})
    with pytest.raises(StorageError, match="listing") as caught:
        open_storage(address)
    told = f"{caught.value}"
    assert "403" in told
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.hint
    assert not any(secret in told for secret in (SECRET, USER, "wrong-and-private"))


def test_a_service_that_is_not_there_is_told_with_what_to_check(address, use):
    (port,) = free_ports(1)
    use(f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match="listing s3://") as caught:
        open_storage(address)
    assert "AWS_ENDPOINT_URL" in caught.value.hint
    assert "Debug source" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["gs://bucket/run", "s3://", "s3://bucket", "s3://bucket/a/../b", "s3://b/run?x=1"]
)
def test_an_address_that_names_no_run_is_refused_with_how_to_write_it(address):
    with pytest.raises(ConfigError) as caught:
        open_storage(address)
    assert address in str(caught.value)
    assert "s3://" in caught.value.hint


def test_what_was_acknowledged_is_there_after_the_server_was_killed(tmp_path, address, use):
    server = SeaweedFS(tmp_path)
    server.start()
    use(server.url)
    storage = open_storage(address)
    appender = storage.appender("journal/a")
    appender.append([b"one"])
    storage.write("large", [bytes(20 << 20)])
    server.stop()
    server.start()
    try:
        appender.append([b"two"])
        assert all_bytes(storage, "journal/a") == b"onetwo"
        assert all_bytes(storage, "large") == bytes(20 << 20)
    finally:
        server.stop()
