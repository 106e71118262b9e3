"""Which IP addresses are of the public internet: IANA's registries of special-purpose addresses, in our own
words.

Python's `is_global` says what its release knew: 3.11 calls 192.0.0.192, where a cloud keeps its secrets, and
3fff::/20 public.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

SPECIAL_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this host on this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared by carriers; 100.100.100.200 is a cloud's metadata
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local; 169.254.169.254 is the metadata of most clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments; 192.0.0.192 is a cloud's metadata
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # relays of 6to4, deprecated
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and the broadcast
            "168.63.129.16/32",  # a cloud's wire server: its number is public, its route is not
        ),
    )
)
GLOBAL_V6 = IPv6Network("2000::/3")
"""All that is assigned to be reached from everywhere; fc00::/7, fe80::/10, ff00::/8, 100::/64 and so on
lie outside.
"""
SPECIAL_V6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments: benchmarks, ORCHID, and Teredo, which is looked into
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which is looked into
            "3fff::/20",  # documentation
        ),
    )
)
NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; one of IPv6 that carries others says what they
    say.
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in SPECIAL_V4)
    if inner := carried(ip):
        return all(is_public(str(one)) for one in inner)
    return ip in GLOBAL_V6 and not any(ip in network for network in SPECIAL_V6)


def carried(ip: IPv6Address) -> list[IPv4Address]:
    """The addresses of IPv4 within one: mapped, 6to4, Teredo (server and client), NAT64."""
    found = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in NAT64:
        found.append(IPv4Address(int(ip) & 0xFFFFFFFF))
    return [one for one in found if one is not None]
