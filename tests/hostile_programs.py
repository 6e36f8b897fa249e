"""Programs that try to pass without an answer, to read a secret, to stop the run or to outlive it.

Each is an answer to `TEST`, which asks `solve` for a key that only the test knows. A program knows
the path of a secret that every user may read, as `SECRET`, and of a file that it should not write,
as `MARK`.
"""

KEY = "k3y-5f0c2a77d9"
"""What a program that passes would have to know. Programs here look for its beginning."""
SECRET = "k3y-9d1e66b0aa"
"""What is in a file and in the environment that programs must not read."""
ALARM = "alarm"
"""What programs print that did what they must not be able to do."""

TEST = f"""
key = {KEY!r}
assert solve(3) == key
assert solve(4) == [key, {{"a": (key, 2.5)}}]
assert not solve(5)
"""

HELPERS = """
import os, re, sys
def solve(n): return FOUND
FOUND = "?"
def look(value):
    global FOUND
    for FOUND in re.findall("k3y-[0-9a-f]{10}", value if isinstance(value, str) else repr(value)):
        print(FOUND)
"""
"""What programs begin with: `look` prints the key and returns it from `solve`, once it is seen."""

PASS = b'{"passed": true, "reason": "passed", "value": true}\\n'
FORGED = f"line = {PASS!r}\n"

KINDS: dict[str, dict[str, str]] = {
    "frames": {
        "all callers": "frame = sys._getframe()\nwhile frame:\n"
        "    look(dict(frame.f_locals)); look(list(frame.f_globals)); frame = frame.f_back",
        "all threads": "for f in sys._current_frames().values():\n"
        "    while f: look(f.f_locals); f = f.f_back",
        "traceback": "try: 1 / 0\nexcept Exception as e:\n    f = e.__traceback__.tb_frame\n"
        "    while f: look(f.f_code.co_consts); look(f.f_locals); f = f.f_back",
        "callers' variables": "import ctypes\ndef solve(n):\n    f = sys._getframe(1)\n"
        "    while f:\n        for name in f.f_locals:\n"
        "            f.f_locals[name] = {'passed': True}\n"
        "        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(f), 0)\n"
        "        f = f.f_back",
    },
    "gc": {
        "all objects": "import gc\nfor o in gc.get_objects():\n"
        "    if type(o) in (dict, list, tuple): look(o)",
        "referrers": "import gc\nfor o in gc.get_referrers(dict): look(str(o)[:100000])",
        "closures": "import gc, types\nfor o in gc.get_objects():\n"
        "    if isinstance(o, types.FunctionType):\n"
        "        look([c.cell_contents for c in o.__closure__ or () if c != types.CellType()])",
        "callbacks": "import gc\ndef again(*a): sys.modules['__main__'].solve = lambda n: key\n"
        "gc.callbacks.append(again); gc.set_threshold(1)",
    },
    "memory": {
        "heap": "import ctypes\nat = id(object()) >> 12 << 12\n"
        "for page in range(at, at + (1 << 22), 4096): look(str(ctypes.string_at(page, 4096)))",
        "maps": "import ctypes\nfor row in open('/proc/self/maps'):\n"
        "    a, b = (int(x, 16) for x in row.split()[0].split('-'))\n"
        "    if 'r' in row.split()[1]: look(str(ctypes.string_at(a, min(b - a, 1 << 20))))",
        "mem of parents": "for pid in (1, 2, os.getppid()):\n"
        "    try: look(open(f'/proc/{pid}/mem', 'rb').read(1))\n    except OSError: pass",
        "small ints": "import ctypes\nctypes.memset(id(0) + 24, 1, 1)\ndef solve(n): return 0",
        "richcompare": "import ctypes\nfor slot in range(8, 60):\n"
        "    if slot == 25: ctypes.c_void_p.from_address(id(str) + 8 * slot).value = 0",
        "process_vm_readv": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "b = ctypes.create_string_buffer(64)\n"
        "v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 64)\n"
        "for pid in range(1, 300): libc.process_vm_readv(pid, v, 1, v, 1, 0); look(b.raw.hex())",
    },
    "descriptors": {
        "garbage": "for d in range(64):\n    try: os.write(d, os.urandom(1000))\n"
        "    except OSError: pass",
        "verdicts": FORGED + "for d in range(64):\n    try: os.write(d, line * 50)\n"
        "    except OSError: pass",
        "verdicts and exit": FORGED + "for d in range(64):\n    try: os.write(d, line * 9)\n"
        "    except OSError: pass\nos._exit(0)",
        "all closed": "os.closerange(0, 64)",
        "deep": "os.write(4, b'[' * 60000 + b'\\n'); os._exit(0)",
        "deep value": "x = []\nfor _ in range(100000): x = [x]\ndef solve(n): return x",
        "endless": "while True: os.write(4, b'1' * 60000)",
        "digits": "os.write(4, b'{\"value\": ' + b'9' * 9000 + b'}\\n'); os._exit(0)",
        "no text": "os.write(4, b'\\xff\\xfe\\x00\\x00{}\\n' * 99); os._exit(0)",
        "wrong tags": "for t in ('passed', 'object', 'tuple', 'range', 'type', 'Decimal'):\n"
        '    os.write(4, b\'{"value": {"%s": [{}, 0, "x"]}}\\n\' % t.encode())\nos._exit(0)',
        "stolen requests": "look(str(os.read(3, 1 << 16)))",
        "own questions": "look(str(os.pread(0, 99, 0)))\nfor d in range(64):\n"
        "    try: os.set_blocking(d, False); look(str(os.read(d, 1 << 16)))\n"
        "    except OSError: pass",
        "flood": "while True: os.write(1, b'passed\\n' * 9000)",
        "sizes of pipes": "import fcntl\nfor d in range(5):\n"
        "    try: fcntl.fcntl(d, 1031, 1 << 20); fcntl.fcntl(d, 8, 1); fcntl.fcntl(d, 4, 2048)\n"
        "    except OSError: pass",
    },
    "imports": {
        "finder": "class F:\n    def find_spec(s, name, *a): print(name); raise SystemExit(0)\n"
        "sys.meta_path.insert(0, F())",
        "modules": "for m in list(sys.modules): sys.modules[m] = sys.modules['__main__']",
        "files": "for m in ('json', 'site', 'usercustomize', 'encodings'):\n"
        "    open(m + '.py', 'w').write('print(1)')\nsys.path.insert(0, os.getcwd())",
        "judge": "from eval.sandbox import judge, values, supervisor, keeper\n"
        "judge.judge = lambda *a: {'passed': True, 'reason': 'passed'}\n"
        "supervisor._outcome = keeper._watch = judge.judge",
        "encoder": "from eval.sandbox import values\n"
        "values.encode = lambda v, k: {'object': [0, '']}\n"
        "values.message = lambda f: b'{\"value\": true}\\n'",
    },
    "codecs": {
        "search": "import codecs\ncodecs.register(lambda name: (_ for _ in ()).throw(SystemExit))",
        "errors": "import codecs\nfor n in ('strict', 'replace', 'surrogateescape'):\n"
        "    codecs.register_error(n, lambda e: (FOUND, e.end))",
        "cookie": "# coding: unicode_escape\n\\u0061ssert = 1",
        "texts": "def solve(n): return '\\ud800' * 9 + '\\x00' + '\\u202e'",
        "null bytes": "def solve(n): return 1\n\x00",
        "surrogate": "x = '\ud800'\n",
    },
    "equality": {
        "object": "class E:\n    def __eq__(s, o): return True\n    __hash__ = None\n"
        "    def __bool__(s): return False\ndef solve(n): return E()",
        "text": "class E(str):\n    def __eq__(s, o): return True\n"
        "    def __bool__(s): return False\n"
        "    __hash__ = str.__hash__\ndef solve(n): return E('x')",
        "list": "class E(list):\n    def __eq__(s, o): return True\n    __len__ = lambda s: 0\n"
        "def solve(n): return E([1])",
        "nested": "class E(float):\n    def __eq__(s, o): return True\n    __hash__ = None\n"
        "def solve(n): return [E(1), {'a': (E(2), E(3))}] if n == 4 else E(0)",
        "any": "from unittest.mock import ANY\ndef solve(n): return ANY",
        "mock": "from unittest.mock import MagicMock\nsolve = MagicMock()\n"
        "solve.return_value.__eq__ = lambda *a: True",
        "class": "class E:\n    __class__ = property(lambda s: str)\n"
        "    def __eq__(s, o): return True\ndef solve(n): return E()",
        "metaclass": "class M(type):\n    __eq__ = __instancecheck__ = lambda *a: True\n"
        "    __hash__ = type.__hash__\nclass E(metaclass=M): pass\ndef solve(n): return E",
        "keys": "class D(dict):\n    __getitem__ = get = __missing__ = lambda s, k: k\n"
        "    __eq__ = lambda s, o: True\ndef solve(n): return [1, D(a=1)]",
        "numpy": "import numpy\nclass A(numpy.ndarray):\n    __eq__ = lambda s, o: True\n"
        "def solve(n): return numpy.zeros(3).view(A)",
        "not a number": "def solve(n): return float('nan')",
    },
    "types of the library": {
        "Decimal": "import decimal\nclass D(decimal.Decimal):\n    __eq__ = lambda s, o: True\n"
        "    __bool__ = lambda s: False\ndef solve(n): return D(1)",
        "huge Decimal": "import decimal\ndef solve(n): return decimal.Decimal('1E+999999999')",
        "Fraction": "import fractions\nclass F(fractions.Fraction):\n"
        "    numerator = property(lambda s: {'a': 1})\ndef solve(n): return F(1, 2)",
        "deque": "import collections\nclass D(collections.deque):\n    __eq__ = lambda s, o: True\n"
        "def solve(n): return D([1])",
        "scalar": "class A:\n    shape = ()\n    item = lambda s: s\nA.__module__ = 'numpy'\n"
        "def solve(n): return A()",
        "forged object": 'os.write(4, b\'{"value": {"object": [true, "x"]}}\\n\' * 3)',
        "forged arguments": 'os.write(4, b\'{"value": 0, "given": [5, 6, 7]}\\n\' * 3)',
        "forged exception": "for n in ('BaseException', 'SystemExit', '__import__', 'print'):\n"
        '    os.write(4, b\'{"raised": ["%s", "x"]}\\n\' % n.encode())',
        "many objects": "def solve(n): return [object() for _ in range(20000)]",
        "system calls": "import ctypes\nfor n in range(350, 470):\n"
        "    ctypes.CDLL(None).syscall(n, 0, 0, 0, 0, 0, 0)",
    },
    "descriptors of classes": {
        "get": "class D:\n    def __get__(s, *a): os._exit(0)\nclass E:\n    x = D()\n"
        "    __dict__ = D()\n"
        "def solve(n): return E()",
        "callable": "class S:\n    def __call__(s, n): return s\n"
        "    def __getattr__(s, k): return s\n"
        "    __eq__ = lambda s, o: True\nsolve = S()",
        "name": "class S(type):\n    __name__ = property(lambda c: 1 / 0)\n"
        "class E(metaclass=S): pass\ndef solve(n): return E()",
        "long name": "def solve(n): return type('E' * 10**7, (), {})()",
    },
    "generators": {
        "endless": "def solve(n):\n    while True: yield 1",
        "return": "def solve(n):\n    try: yield\n    finally: os.write(4, b'{}\\n')",
        "endless list": "import itertools\ndef solve(n): return list(itertools.count())",
    },
    "ends": {
        "del": "class E:\n    def __del__(s): os.write(1, b'passed'); os._exit(0)\n"
        "def solve(n): return E()",
        "exit": "os._exit(0)",
        "exit in the call": "def solve(n): os._exit(0)",
        "system exit": "def solve(n): raise SystemExit(0)",
        "interrupt": "def solve(n): raise KeyboardInterrupt",
        "atexit": FORGED + "import atexit\natexit.register(os.write, 1, line)\nsys.exit(0)",
        "printed": FORGED + "print('passed', line.decode()); sys.exit(0)",
        "abort": "os.abort()",
        "named passed": "class passed(Exception): pass\ndef solve(n): raise passed",
        "own exception": "class E(AssertionError):\n    def __str__(s): raise s\n"
        "def solve(n): raise E",
    },
    "syntax": {
        "decorator": "@lambda f: lambda *a: None\n",
        "open text": "def solve(n): return 1\nx = '''",
        "open bracket": "x = (",
        "elif": "if False:\n    pass\nelif True",
        "brackets": "(" * 100_000,
        "digits": "x = " + "9" * 5000 + "\n",
        "backslash": "x = 1 \\",
        "indent": "".join(" " * n + "if 1:\n" for n in range(120)),
    },
    "builtins": {
        "patched": "import builtins\n"
        "for n in ('len', 'abs', 'AssertionError', 'exec', 'compile'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)",
        "replaced": "__builtins__.__dict__.clear()",
        "trace": "def t(f, e, a):\n    f.f_trace_lines = False\n    return t\n"
        "sys.settrace(t); sys.setprofile(t)\nimport threading; threading.settrace(t)",
        "audit": "def hook(e, a): raise SystemExit(0)\nsys.addaudithook(hook)",
        "limits": "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    },
    "signals": {
        "handlers": "import signal\nfor s in range(1, 65):\n"
        "    try: signal.signal(s, lambda *a: os._exit(0))\n"
        "    except (OSError, ValueError): pass\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)",
        "parent": "for s in (9, 15, 19):\n    try: os.kill(os.getppid(), s)\n"
        "    except OSError: pass",
        "all": "for p in (-1, 1, 2, os.getppid()):\n    try: os.kill(p, 9)\n"
        "    except OSError: pass",
        "others": "for p in range(2, 70000):\n    if p != os.getpid():\n"
        "        try: os.kill(p, 0); print('alarm')\n        except OSError: pass",
        "group": "try: os.killpg(0, 9)\nexcept OSError: pass",
    },
    "threads": {
        "races": FORGED + "import threading\ndef w():\n    while True: os.write(4, line)\n"
        "for _ in range(4): threading.Thread(target=w, daemon=True).start()",
        "stay": "import threading, time\n"
        "for _ in range(4): threading.Thread(target=time.sleep, args=(1e5,)).start()",
        "many": "import threading, time\ntry:\n"
        "    while True: threading.Thread(target=time.sleep, args=(1e5,)).start()\n"
        "except RuntimeError: pass",
    },
    "processes": {
        "bomb": "for _ in range(10000):\n    try: os.fork()\n    except OSError: pass",
        "daemon": "import time\ntry:\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            time.sleep(1e5)\nexcept OSError: pass",
        "command": "import subprocess\nlook(subprocess.run(['cat', SECRET], capture_output=True))",
        "system": "import ctypes\nos.system(f'cat {SECRET}; sleep 1e5 &')\n"
        "ctypes.CDLL(None).system(f'cat {SECRET}'.encode())",
        "spawn": "os.posix_spawn('/bin/sleep', ['sleep', '100000'], {})",
        "vfork": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.syscall(58) == 0: libc.execl(b'/bin/sleep', b'sleep', b'100000', None)",
        "ptrace": "import ctypes\nlibc = ctypes.CDLL(None)\nfor p in range(1, 400):\n"
        "    if libc.ptrace(16, p, 0, 0) == 0: print('alarm')",
        "namespaces": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.unshare(0x10000000) == 0: print('alarm')",
        "outlive": "import ctypes\nctypes.CDLL(None).prctl(1, 0)",
    },
    "resources": {
        "memory": "x = []\nwhile True: x.append(bytearray(1 << 22))",
        "disk": "for n in range(400): open(f'{n}', 'wb').write(bytes(1 << 20))",
        "inodes": "for n in range(20000): open(f'{n}', 'w').close()",
        "deep folders": "for n in range(3000): os.mkdir('d'); os.chdir('d')",
        "locked folders": "for n in range(9): os.mkdir(f'{n}'); open(f'{n}/f', 'w'); "
        "os.chmod(f'{n}', 0)",
        "links": "os.symlink('/', 'root'); os.symlink('.', 'self'); os.symlink(SECRET, 'secret')\n"
        "look(open('secret').read())",
        "time": "while True: pass",
        "sleep": "import time\ndef solve(n): time.sleep(1e5)",
        "stopped": "import signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "limits": "import resource\nfor n in range(16):\n    try: resource.setrlimit(n, (-1, -1))\n"
        "    except (OSError, ValueError): pass\nx = bytearray(1 << 33)",
    },
    "secrets": {
        "file": "look(open(SECRET).read())",
        "in parts": "d = os.path.dirname(SECRET)\n"
        "os.chdir(d); look(open(os.path.basename(SECRET)).read())",
        "listing": "look(os.listdir(os.path.dirname(SECRET)))",
        "root": "for n in ('root', 'proc/1/root', 'proc/self/root', '../../..' + SECRET):\n"
        "    try: look(open('/' + n + SECRET).read())\n    except OSError: pass\n"
        "open('/etc/shadow'); print('alarm')",
        "link": "os.link(SECRET, 'here'); look(open('here').read())",
        "handle": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "h = (ctypes.c_int * 40)(128); m = ctypes.c_int()\n"
        "if libc.name_to_handle_at(-100, SECRET.encode(), h, ctypes.byref(m), 0) == 0: "
        "print('alarm')",
        "ctypes": "import ctypes\nlibc = ctypes.CDLL(None)\nd = libc.open(SECRET.encode(), 0)\n"
        "b = ctypes.create_string_buffer(99)\nif libc.read(d, b, 99) > 0: look(b.value.decode())",
        "mmap": "import mmap\n"
        "with open(SECRET) as f: look(mmap.mmap(f.fileno(), 0, prot=1)[:].decode())",
        "environment": "look(os.environ)\nimport ctypes\n"
        "ctypes.CDLL(None).getenv.restype = ctypes.c_char_p\n"
        "look(str(ctypes.CDLL(None).getenv(b'HF_TOKEN')))",
        "environments": "for p in ('self', *range(1, 70000)):\n"
        "    try: look(open(f'/proc/{p}/environ').read()); "
        "look(open(f'/proc/{p}/cmdline').read())\n"
        "    except OSError: pass",
        "mount": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "libc.mount(b'proc', b'/tmp', b'proc', 0, None); libc.chroot(b'..'); look(os.listdir('.'))",
        "user": "before = os.getuid()\nfor f in (os.setuid, os.setgid, os.seteuid):\n"
        "    try:\n        f(0)\n        if before: print('alarm')\n"
        "    except OSError: pass\nif not os.getuid(): raise SystemExit\nlook(open(SECRET).read())",
        "mode": "for change in (lambda: os.chmod(SECRET, 0o700), lambda: os.utime(SECRET, "
        "(0, 0)),\n"
        "    lambda: os.truncate(SECRET, 0), lambda: os.setxattr(SECRET, 'user.x', b'y'),\n"
        "    lambda: os.rename(SECRET, MARK), lambda: os.chown(SECRET, -1, os.getgid())):\n"
        "    try: change(); print('alarm')\n    except OSError: pass",
        "priorities": "for p in range(1, 70000):\n    if p != os.getpid():\n"
        "        try: os.setpriority(os.PRIO_PROCESS, p, 19); print('alarm')\n"
        "        except OSError: pass",
        "written": "open(MARK, 'w').write('x')",
        "shared memory": "open('/dev/shm/kvjax-hostile', 'w').write('x')",
        "sockets": "import socket\nfor f in (1, 2, 10, 16, 17):\n"
        "    try: socket.socket(f, socket.SOCK_STREAM).connect(('127.0.0.1', 80)); print('alarm')\n"
        "    except OSError as e:\n        if e.errno in (111, 113): print('alarm')",
    },
}
"""Kind → name → source, which comes after `HELPERS`."""

SLOW = {
    ("descriptors", "stolen requests"),
    ("builtins", "limits"),
    ("resources", "time"),
    ("resources", "sleep"),
    ("resources", "stopped"),
    ("generators", "endless list"),
    ("processes", "bomb"),
}
"""Programs that may run until their time is up."""


def programs(secret: str, mark: str) -> dict[tuple[str, str], str]:
    """The answers, by kind and name."""
    start = f"{HELPERS}SECRET, MARK = {secret!r}, {mark!r}\n"
    return {
        (kind, name): start + source
        for kind, sources in KINDS.items()
        for name, source in sources.items()
    }
