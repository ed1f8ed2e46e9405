/* What loading routes costs without Python: N routes 10.x.y.z/30 through one gateway into the main table, and out again.
 *
 * routes GATEWAY SOURCE INTERFACE-INDEX COUNT: prints seconds in, and seconds out. Requests go 64 at a time with one ACK, as
 * cni/netlink.py sends them.
 */
#include <arpa/inet.h>
#include <linux/rtnetlink.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 64, METRIC = 2048, PROTOCOL = 143 };

struct request {
	struct nlmsghdr head;
	struct rtmsg route;
	struct nlattr dst_attr; uint32_t dst;
	struct nlattr metric_attr; uint32_t metric;
	struct nlattr source_attr; uint32_t source;
	struct nlattr gateway_attr; uint32_t gateway;
	struct nlattr oif_attr; uint32_t oif;
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* The answers to one chunk: refusals, and the ACK of the last. */
static void answers(int fd, uint32_t last)
{
	static char buffer[1 << 16];
	for (;;) {
		ssize_t size = recv(fd, buffer, sizeof buffer, 0);
		if (size < 0)
			fail("recv");
		for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, size); h = NLMSG_NEXT(h, size)) {
			struct nlmsgerr *e = NLMSG_DATA(h);
			if (h->nlmsg_type == NLMSG_ERROR && e->error) {
				fprintf(stderr, "refused: %s\n", strerror(-e->error));
				exit(1);
			}
			if (h->nlmsg_seq == last)
				return;
		}
	}
}

static double all(int fd, int type, int flags, uint32_t gateway, uint32_t source, uint32_t oif,
		  uint32_t count)
{
	static struct request batch[CHUNK];
	double begin = now();
	for (uint32_t done = 0; done < count;) {
		int n = 0;
		for (; n < CHUNK && done < count; n++, done++) {
			struct request *r = &batch[n];
			memset(r, 0, sizeof *r);
			r->head = (struct nlmsghdr){ .nlmsg_len = sizeof *r, .nlmsg_type = type,
				.nlmsg_flags = NLM_F_REQUEST | flags, .nlmsg_seq = done + 1 };
			r->route = (struct rtmsg){ .rtm_family = AF_INET, .rtm_dst_len = 30, .rtm_table = RT_TABLE_MAIN,
				.rtm_protocol = PROTOCOL, .rtm_type = RTN_UNICAST };
			r->dst_attr = (struct nlattr){ 8, RTA_DST };
			r->dst = htonl(0x0a400000u + 4 * done);
			r->metric_attr = (struct nlattr){ 8, RTA_PRIORITY };
			r->metric = METRIC;
			r->source_attr = (struct nlattr){ 8, RTA_PREFSRC };
			r->source = source;
			r->gateway_attr = (struct nlattr){ 8, RTA_GATEWAY };
			r->gateway = gateway;
			r->oif_attr = (struct nlattr){ 8, RTA_OIF };
			r->oif = oif;
		}
		batch[n - 1].head.nlmsg_flags |= NLM_F_ACK;
		if (send(fd, batch, n * sizeof *batch, 0) < 0)
			fail("send");
		answers(fd, done);
	}
	return now() - begin;
}

int main(int argc, char **argv)
{
	struct in_addr gateway, source;
	if (argc != 5 || !inet_aton(argv[1], &gateway) || !inet_aton(argv[2], &source))
		return fprintf(stderr, "usage: routes GATEWAY SOURCE INTERFACE-INDEX COUNT\n"), 2;
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), one = 1;
	if (fd < 0)
		fail("socket");
	setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof one);
	uint32_t oif = atoi(argv[3]), count = atoi(argv[4]);
	double in = all(fd, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, gateway.s_addr, source.s_addr, oif, count);
	double out = all(fd, RTM_DELROUTE, 0, gateway.s_addr, source.s_addr, oif, count);
	printf("%.6f %.6f\n", in, out);
	return 0;
}
