"""What runs virtual machines: one protocol (``driver.py``) and its drivers, QEMU and a fake.

Only this layer knows processes. It is handed pages and hands out pages; what they mean for an
overlay is decided below, in ``cloudlet.overlay``, and what they are for above, in ``cloudlet.control``.
"""
