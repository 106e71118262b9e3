"""`ray ARGUMENTS...` for nodes on loopback: Ray would put the machine's own address in the place of
127.0.0.1, and its head then listen on every interface.
"""

from ray._private import services
from ray.scripts.scripts import main

if __name__ == "__main__":
    services.resolve_ip_for_localhost = lambda host: host
    main()
