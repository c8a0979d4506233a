"""The whole job on real images, offline, in two minutes: a small network that reads characters in twelve typefaces."""
