"""What `app.py` serves: a file for each tab, the widgets that tabs share, and `requests.py`, which draws."""
