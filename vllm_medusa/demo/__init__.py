"""`make demo`: an environment, a small model and a side-by-side run, from nothing.

``bootstrap``, ``host``, ``requirements``, ``environment`` and ``failure`` run on
a bare Python before anything is installed, so they import the standard library
and each other only.  The other modules run inside the environment they made.
"""
