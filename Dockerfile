# The image of all of Underlay's processes. manifests/image.py builds the same without an engine, of this machine's Python.
FROM debian:12-slim AS shim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY cni/shim /shim
# Without a C library, so that it runs on any node of this architecture.
RUN gcc @/shim/flags -o /underlay-shim /shim/shim.c

FROM python:3.11-slim-bookworm AS packages
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY agent agent
COPY cni cni
COPY ctl ctl
COPY ipam ipam
COPY lab lab
COPY store store
# Without the lab, and without what lies beside packages: their programs, and ExaBGP's examples.
RUN pip install --no-cache-dir --target /opt/underlay '.[kube]' \
    && rm -rf /opt/underlay/lab /opt/underlay/bin /opt/underlay/etc

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="underlay" \
      org.opencontainers.image.description="A pod network without an overlay: every pod address routable by the physical network" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PYTHONPATH=/opt/underlay PYTHONDONTWRITEBYTECODE=1
RUN groupadd --gid 65532 underlay && useradd --uid 65532 --gid 65532 --no-create-home --home-dir / underlay
COPY --from=packages /opt/underlay /opt/underlay
COPY --from=shim /underlay-shim /opt/cni/underlay
# The programs that the manifests call, each one line.
RUN for program in underlayctl:ctl.main underlay-agent:agent.daemon underlay-cni:cni.daemon \
        underlay-cni-install:cni.installer underlay-speaker:agent.bgp.speaker underlay-uninstall:agent.uninstall; do \
      printf '#!/usr/local/bin/python3 -P\nimport sys\nfrom %s import main\nsys.exit(main())\n' "${program#*:}" \
        >"/usr/bin/${program%%:*}" && chmod 755 "/usr/bin/${program%%:*}" || exit 1; \
    done
