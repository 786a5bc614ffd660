# SPDX-License-Identifier: Apache-2.0
"""A dom0 without Xen, in which runX lives whole lives of containers: a xenstored, an xl, and scripted guests.

host.py runs in namespaces of its own and starts runX in them; server.py is Xen's side, in a second process there;
dom0.py is what tests talk to.
"""
