"""Widgets that read a run folder; each is also a picture for readers without a kernel (`picture_box`)."""
