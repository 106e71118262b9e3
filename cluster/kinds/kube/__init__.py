"""Kubernetes: KubeRay clusters and jobs, scheduled evaluation, the tracking server."""
