"""A small Hub on loopback, without xet: what huggingface_hub asks for to create, push, list and load models.

    with Hub() as hub:                     # HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN
        hub.fail("cut", "PUT", "/lfs/")    # the next upload of a large file is cut off in its middle
"""

import base64
import hashlib
import json
import threading

import yaml
from huggingface_hub.utils.sha import git_hash
from werkzeug.exceptions import HTTPException, abort
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

TOKEN = "hf_loopback"  # writing needs it, reading does not
REPOSITORY, REVISION, ROUTES = "/api/models/<user>/<name>", "/<revision>", Map()


def route(method: str, *paths: str):
    """Requests that a method of [`Hub`] answers."""
    return lambda handler: [ROUTES.add(Rule(path, methods=[method], endpoint=handler)) for path in paths] and handler


def refuse(status: int, message: str, code: str = "", commit: str = ""):
    """End a request as the Hub does."""
    abort(Response("{}", status, {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}))


def cut_off(body: bytes):
    """The first half of a body; then the connection is gone."""
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("cut off on purpose")


class Repository:
    """Files by path in every commit, and the commit of each branch. A large file is its sha256, another one its bytes."""

    def __init__(self):
        self.commits, self.branches = {}, {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict) -> str:
        """Make a branch's new commit; returns its name."""
        oid = hashlib.sha1(repr((len(self.commits), files)).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def files(self, revision: str) -> tuple[str, dict]:
        """Commit and files of a branch or commit."""
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else refuse(404, revision, "RevisionNotFound")


class Hub:
    """The server; a context manager that starts and stops it. `requests` lists method, path and range of each request."""

    def __init__(self, port: int = 0):
        self.port, self.repositories, self.objects, self.requests, self.faults = port, {}, {}, [], []

    def __enter__(self) -> "Hub":
        quiet = {"log": lambda *args: None}
        self.server = make_server("127.0.0.1", self.port, self, request_handler=type("Quiet", (WSGIRequestHandler,), quiet))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, kind: str | int, method: str, path: str, times: int = 1) -> None:
        """Answer the next requests whose path holds `path` with a status, "cut" in the middle, or a byte short ("size")."""
        self.faults += [(kind, method, path)] * times

    def __call__(self, environ, start_response):
        """Answer one request, as WSGI has it."""
        request = Request(environ)
        self.requests.append(f"{request.method} {request.path} {request.headers.get('Range', '')}".strip())
        fault = next((one for one in self.faults if one[1] == request.method and one[2] in request.path), (None,))
        self.faults.remove(fault) if fault[0] else None
        try:
            return self.answer(request, fault[0])(environ, start_response)
        except HTTPException as error:
            return error.get_response()(environ, start_response)

    def answer(self, request: Request, fault: str | int | None) -> Response:
        """The response to a request, or the wrong one that a fault asks for."""
        if isinstance(fault, int):
            refuse(fault, f"fault {fault}", "RepoNotFound" if fault == 404 else "")
        handler, arguments = ROUTES.bind_to_environ(request.environ).match()
        needs_token = request.method == "POST" and request.path != "/api/validate-yaml"
        if needs_token and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            refuse(401, "expected a token")
        if "user" in arguments:
            name = f"{arguments.pop('user')}/{arguments.pop('name')}"
            arguments["repository"] = self.repositories.get(name) or refuse(404, f"no {name}", "RepoNotFound")
        request.fault = fault
        answer = handler(self, request, **arguments)
        response = answer if isinstance(answer, Response) else Response(json.dumps(answer))
        if request.method == "GET" and fault == "cut":
            return Response(cut_off(response.get_data()), response.status, response.headers)
        if request.method == "GET" and fault == "size":
            response.set_data(response.get_data()[:-1])
        return response

    @route("POST", "/api/repos/create")
    def create(self, request):
        name = f"{request.json['organization'] or 'me'}/{request.json['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, Repository())
        return Response(json.dumps({"url": f"{self.endpoint}/{name}", "name": name}), status)

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request):
        try:
            metadata = yaml.safe_load(request.json["content"].split("---\n")[1])
            is_valid = metadata.get("license", "none").islower() and all(isinstance(tag, str) for tag in metadata.get("tags", []))
        except (IndexError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            is_valid = False
        return Response(json.dumps({"errors": [{"message": "invalid metadata"}]}), 200 if is_valid else 400)

    @route("GET", REPOSITORY, REPOSITORY + "/revision" + REVISION)
    def info(self, request, repository, revision="main"):
        oid, files = repository.files(revision)
        return {"id": request.path.removeprefix("/api/models/"), "sha": oid, "siblings": [{"rfilename": f} for f in files]}

    @route("GET", REPOSITORY + "/tree" + REVISION, REPOSITORY + "/tree" + REVISION + "/<path:folder>")
    def tree(self, request, repository, revision, folder=""):
        entries = [self.entry(*file) for file in repository.files(revision)[1].items() if file[0].startswith(folder)]
        return entries or refuse(404, f"no folder {folder}", "EntryNotFound")

    def entry(self, path: str, content: str | bytes) -> dict:
        """A file in a tree."""
        if isinstance(content, bytes):
            return {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        lfs = {"oid": content, "size": len(self.objects[content]), "pointerSize": 130}
        return {"type": "file", "path": path, "size": lfs["size"], "oid": git_hash(content.encode()), "lfs": lfs}

    @route("GET", REPOSITORY + "/refs")
    def refs(self, request, repository):
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.branches.items()]
        return {"branches": heads, "converts": [], "tags": []}

    @route("POST", REPOSITORY + "/branch/<branch>")
    def make_branch(self, request, repository, branch):
        if repository.branches.setdefault(branch, repository.branches["main"]) is not repository.branches["main"]:
            refuse(409, "Reference already exists")
        return {}

    @route("POST", REPOSITORY + "/preupload" + REVISION)
    def preupload(self, request, repository, revision):
        files, answer = repository.files(revision)[1], []
        for path in (file["path"] for file in request.json["files"]):
            oid = git_hash(files[path]) if isinstance(files.get(path), bytes) else files.get(path)
            mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    @route("POST", "/<user>/<name>.git/info/lfs/objects/batch")
    def batch(self, request, repository):
        objects = [{"oid": one["oid"], "size": one["size"]} for one in request.json["objects"]]
        for one in (one for one in objects if one["oid"] not in self.objects):
            one["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/<oid>")
    def upload(self, request, oid):
        body = request.stream.read(request.content_length - bool(request.fault))
        if request.fault == "cut":
            raise ConnectionAbortedError("cut off on purpose")
        if hashlib.sha256(body).hexdigest() != oid:
            refuse(400, f"expected {request.content_length} bytes of {oid}, got {len(body)}")
        self.objects[oid] = body
        return {}

    @route("POST", REPOSITORY + "/commit" + REVISION)
    def commit(self, request, repository, revision):
        files = dict(repository.files(revision)[1])
        for kind, value in (json.loads(line).values() for line in request.get_data().splitlines()):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "lfsFile":
                files[value["path"]] = value["oid"] if value["oid"] in self.objects else refuse(400, "not uploaded")
        return {"commitUrl": request.url.replace("/api/models", ""), "commitOid": repository.commit(revision, files)}

    @route("GET", "/<user>/<name>/resolve" + REVISION + "/<path:path>")
    def resolve(self, request, repository, revision, path):
        commit, files = repository.files(revision)
        content = files[path] if path in files else refuse(404, f"no file {path}", "EntryNotFound", commit)
        body, etag = (content, git_hash(content)) if isinstance(content, bytes) else (self.objects[content], content)
        response = Response(body, headers={"X-Repo-Commit": commit})
        response.set_etag(etag)
        return response.make_conditional(request, accept_ranges=True, complete_length=len(body))
