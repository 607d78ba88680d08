#!/usr/bin/env python3
"""Copy main.py to the board."""
import shutil

shutil.copy("main.py", "/mnt/CIRCUITPY/main.py")
