"""What a run leaves on disk, and how it is continued, mirrored and started headlessly."""
