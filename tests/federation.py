"""Clients in one process, and a Grid between them and a server that can lose, repeat, delay and change messages."""

from types import SimpleNamespace

from client_rows import DIM, moments_of
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from loft_fast.federated import client_app

# Who this process is, which Flower says to the process of an app.
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


class FakeGrid(Grid):
    """Delivers a question when it is asked for the answer; `faults` maps a node to what becomes of its answer."""

    def __init__(self, nodes, *, grouped=True, dim=DIM, forget=None, receive=None, n=40, gone=None):
        self.faults, self.asked, self.fetched = {}, [], []
        self._questions, self._late, self.delivered = {}, [], []

        def fetch(context, exact):
            client = context.node_id
            self.fetched.append(client)
            moments = moments_of([client], exact, grouped, dim, n)
            for part in (gone or {}).get(client, ()):  # deleted where they lay
                moments = moments - part
            moments.site = "fc:input"
            return moments

        app = client_app(fetch, forget=forget, receive=receive, deletes=gone is not None)
        self._apps = {node: app for node in nodes}
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}) for node in nodes
        }

    run = SimpleNamespace(run_id=1)

    def set_run(self, run):
        pass

    def create_message(self, *arguments):
        raise NotImplementedError

    def send_and_receive(self, *arguments, **keywords):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self._apps)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            id = f"{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = id  # as the SuperLink does
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            self._questions[id] = message
            ids.append(id)
        return ids

    def answer(self, question):
        node = question.metadata.dst_node_id
        try:
            answer = self._apps[node](question, self._contexts[node])
        except Exception as error:  # what Flower makes of it
            answer = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=question)
        return answer

    def pull_messages(self, message_ids):
        found = []
        for id in message_ids:
            question = self._questions.pop(id, None)
            if question is not None:
                answer = self.answer(question)
                fault = self.faults.get(question.metadata.dst_node_id)
                found += [answer] if fault is None else fault(answer)
        self.delivered += found
        return found
