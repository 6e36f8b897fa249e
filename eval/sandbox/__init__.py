"""Runs Python that a model wrote, in a process of its own that is confined in layers.

runner (asks for a run, here) → supervisor (a fresh interpreter: namespaces, time and output limits)
→ worker (its child: rlimits, another uid, seccomp, Landlock; executes the program).

The layers keep a program from harming the machine and from outliving its run. They don't make its
result proof: it runs in the interpreter that reports it, and one that sets out to forge a pass can.
"""
