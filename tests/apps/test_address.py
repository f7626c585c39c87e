"""Which hosts are this machine alone."""

import pytest

from tarflowlm_apps.address import is_local, names_of


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST"])
def test_a_host_of_this_machine_alone_answers_to_no_other_name(host):
    """A page elsewhere could let its own name point here."""
    assert is_local(host)
    assert host in names_of(host)
    assert "*" not in names_of(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.7", "example.com", "localhost.example.com"]
)
def test_other_hosts_answer_to_every_name(host):
    assert not is_local(host)
    assert names_of(host) == ["*"]
