"""The edge daemon: profiles its server, trains when a plan arrives, keeps its data."""
