"""What clients of the tests have: here, as it is imported by the processes of a Flower simulation, too."""

import torch

import loft_fast as loft

DIM, EXACT = 16, 50.0


def rows(client, n=40, dim=DIM):
    """Rows and labels of a client: clients have other means, and only some of the classes."""
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64) + torch.linspace(0, client % 7, dim)
    return x, torch.randint(client % 3, client % 3 + 3, (n,), generator=generator)


def moments_of(clients, exact=None, grouped=True, dim=DIM, n=40):
    """What one process has that sees all rows of these clients."""
    whole = loft.GroupedMoments(dim, exact=exact) if grouped else loft.Moments(dim, exact=exact)
    for client in clients:
        x, labels = rows(client, n, dim)
        whole.update(x, labels) if grouped else whole.update(x)
    return whole
