"""What `app.py` serves: a file for each tab, what they share in `common.py`, the looks in `looks.py`."""
