"""Building the project's images from its Dockerfile, without a Docker daemon."""
