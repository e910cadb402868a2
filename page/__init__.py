"""What `app.py` serves: a file for each tab, the widgets that they share, and `requests.py`, which draws."""
