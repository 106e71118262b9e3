"""Addresses of IANA's special-purpose registries and of clouds' metadata are not public; their
neighbours are.
"""

from ipaddress import IPv4Address, ip_network

import pytest

from pipelines.sources.web.addresses import is_public

PRIVATE = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.9.1"),
    *("169.254.169.254", "169.254.0.23", "172.16.0.0", "172.31.255.255", "192.0.0.1", "192.0.0.192"),
    *("192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.7"),
    *("203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("::", "::1", "::127.0.0.1", "::93.184.216.34", "100::1", "100:0:0:1::1", "2001::1", "2001:2::1"),
    *("2001:10::1", "2001:20::1", "2001:db8::1", "3fff::1", "3fff:fff::1", "5f00::1", "fc00::1"),
    *("fd00:ec2::254", "fd20:ce::254", "fe80::1%eth0", "febf::1", "fec0::1", "ff02::1", "4000::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:192.0.0.192", "::ffff:168.63.129.16"),
    *("64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "64:ff9b:1::5db8:d822"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:a83f:8110::"),
    # Teredo: a public server and a private client, whose bits are inverted; then the other way round
    *("2001:0:5db8:d822:0:0:f5ff:fffe", "2001:0:a00:1:0:0:a247:27dd"),
]
PUBLIC = [
    *("93.184.216.34", "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.0.0.1"),
    *("128.0.0.1", "169.253.255.255", "172.15.255.255", "172.32.0.0", "191.255.255.255", "192.0.1.0"),
    *("192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255"),
    *("168.63.129.15", "168.63.129.17", "2606:4700::1111", "2a00:1450::8a", "2001:200::1", "2001:4860::1"),
    *("2000::1", "3ffe::1", "3fff:1000::1", "::ffff:93.184.216.34", "64:ff9b::93.184.216.34"),
    *("2002:5db8:d822::1", "2001:0:5db8:d822:0:0:a247:27dd"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_special_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_others_are(address):
    assert is_public(address)


def test_nothing_is_public_that_python_calls_private_and_knows_better():
    """A step through all addresses of version 4: what Python's own list refuses, ours does too, but for a few
    that the registry calls reachable from everywhere.
    """
    reachable = [ip_network(one) for one in ("192.31.196.0/24", "192.52.193.0/24", "192.175.48.0/24")]
    for number in range(0, 1 << 32, 65_521):
        ip = IPv4Address(number)
        if not ip.is_global and not any(ip in network for network in reachable):
            assert not is_public(str(ip)), ip
