"""The commands that talk to a served site, a file for each noun, as the API has them.

The same classes are ``cloudlet NOUN VERB`` and, as a plug-in, ``openstack cloudlet NOUN VERB``; so a command
takes its client from ``self.app.client_manager``, which both applications have.

What they are called: ``base`` and ``overlay`` are files on this machine, too, and ``cloudlet base list``,
``overlay show`` have always meant those. What is at a site is therefore said with ``site``: ``cloudlet site
base list``, ``site overlay show``, as ``site show`` shows the site itself. Verbs that carry a file between
here and a site have both ends in their meaning and stand with the noun: ``overlay upload``. Apps, instances,
operations and events are at a site only and need no more words. ``openstack`` has nothing that is here, so
there all nouns are plain: ``openstack cloudlet base list``.
"""
