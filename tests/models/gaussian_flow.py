"""The flow of Gaussian data, whose best velocity and whose paths are known in closed form."""


class Gaussian:
    """The best velocity for data N(mean, std^2), in closed form: E[eps - x0 | x_t]. Asked at 1000 t, like a network."""

    def __init__(self, mean=0.5, std=0.4):
        self.mean = mean
        self.std = std

    def __call__(self, xt, t):
        t = (t / 1000)[:, None, None, None]
        # x_t is Gaussian, too; x0 and eps given x_t by linear regression
        variance = (1 - t) ** 2 * self.std**2 + t**2
        away = (xt - (1 - t) * self.mean) / variance
        return t * away - (self.mean + (1 - t) * self.std**2 * away)

    def path(self, eps, t):
        """Where the ODE is at time t, if it began at eps."""
        return (1 - t) * self.mean + ((1 - t) ** 2 * self.std**2 + t**2) ** 0.5 * eps
