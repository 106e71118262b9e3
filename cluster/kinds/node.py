"""`ray ARGUMENTS...` for nodes on loopback: Ray would put the machine's own address in the place of
127.0.0.1, and its head then listen on every interface, or its agents seek a head that listens on none.
"""

import os

from ray._private import ray_constants, services
from ray.scripts.scripts import main

if __name__ == "__main__":
    services.resolve_ip_for_localhost = lambda host: host
    # What this process starts takes 127.0.0.1 for the machine's address; read here, it would forbid workers.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    main()
