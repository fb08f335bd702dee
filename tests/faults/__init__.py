"""Bad days: processes that die, disks that fill, files that are not what they seem."""
