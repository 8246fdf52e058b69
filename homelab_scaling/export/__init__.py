"""Models out of this project and into it, in the formats that others read."""
