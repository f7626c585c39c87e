"""Where other machines reach what is served."""

import pytest

from tarflowlm_apps.address import in_network


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_what_this_machine_alone_reaches_has_no_address_in_the_network(host):
    assert in_network(host, 7860) is None


def test_a_host_is_reached_by_its_own_name():
    assert in_network("10.0.0.7", 80) == "http://10.0.0.7:80/"
    assert in_network("fd00::7", 80) == "http://[fd00::7]:80/"
    everywhere = in_network("0.0.0.0", 7860)
    assert everywhere is None or everywhere.endswith(":7860/")
    assert "0.0.0.0" not in str(everywhere)
