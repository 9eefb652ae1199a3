from datetime import timedelta

import pytest

from neuroloop.core.credentials import Role, new_key, parted, recorded, valid_name
from neuroloop.core.schemas import now


def test_keys_are_long_random_and_recognisable():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("nl_") and parted(key) for key in keys)
    assert all(len(parted(key)[1]) == 43 for key in keys)  # 256 bits


def test_what_is_recorded_tells_the_right_secret_and_does_not_hold_it():
    key = new_key()
    row = recorded(key, name="ann", role=Role.READER)
    assert row.matches(parted(key)[1])
    assert not row.matches(parted(new_key())[1])
    assert parted(key)[1] not in row.model_dump_json()


@pytest.mark.parametrize("text", ["", "nl_", "nl_abc_def", new_key() + "x", new_key()[:-1], "NL" + new_key()[2:]])
def test_what_has_not_the_form_of_a_key_is_none(text: str):
    assert parted(text) is None
    with pytest.raises(ValueError, match="no key"):
        recorded(text, name="ann", role=Role.READER)


def test_each_role_may_do_what_the_ones_before_it_may():
    assert [[one.covers(other) for other in Role] for one in Role] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_a_role_can_be_lowered_and_never_raised():
    assert Role.ADMIN.lowered(Role.READER) is Role.READER
    assert Role.UPLOADER.lowered(Role.ADMIN) is Role.UPLOADER


def test_a_key_stands_until_it_is_revoked_or_its_time_is_over():
    row = recorded(new_key(), name="ann", role=Role.READER, expires_at=now() + timedelta(hours=1))
    assert row.standing() == "valid"
    assert row.model_copy(update={"expires_at": now()}).standing() == "expired"
    assert row.model_copy(update={"revoked_at": now()}).standing() == "revoked"


@pytest.mark.parametrize("name", ["ann", "Zoë Müller", "ann@example.org", "x" * 100])
def test_a_name_of_letters_is_a_name(name: str):
    assert valid_name(name)


@pytest.mark.parametrize("name", ["", " ", " ann", "a\nb", "a\0", "\ud800", "x" * 101])
def test_a_name_that_could_not_be_read_or_stored_is_none(name: str):
    assert not valid_name(name)
