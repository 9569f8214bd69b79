"""Reading, checking, preprocessing and caching scans."""
