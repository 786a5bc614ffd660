/* SPDX-License-Identifier: Apache-2.0 */
/* net: interfaces, addresses and routes of the VM, as messages of rtnetlink(7) that runx.py has made. */
#include "init.h"
#include <linux/ethtool.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { INTERFACE_WAIT = 30 };	/* seconds */

static unsigned char hex_byte(const char *hex)
{
	unsigned char byte = 0;

	for (int i = 0; i < 2; i++)
		byte = byte << 4 | (hex[i] >= 'a' ? hex[i] - 'a' + 10 : hex[i] - '0');
	return byte;
}

/*
 * The number of the interface with a MAC address, which is 12 hexadecimal digits; 0: it is not there.  That is what the
 * host has given it: a message may set another one, and two may share that.
 */
static uint32_t find_interface(const char *mac)
{
	int fd = check(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "open", "a socket");
	struct { uint32_t cmd, size; unsigned char data[32]; } permanent;	/* ethtool_perm_addr */
	struct ifreq request;
	uint32_t found = 0;

	for (int number = 1; number < 1024 && !found; number++) {
		int i = 0;
		permanent.cmd = ETHTOOL_GPERMADDR;
		permanent.size = sizeof permanent.data;
		request.ifr_ifindex = number;
		if (ioctl(fd, SIOCGIFNAME, &request) < 0)
			continue;
		request.ifr_data = (void *)&permanent;
		if (ioctl(fd, SIOCETHTOOL, &request) < 0)
			continue;
		while (i < 6 && permanent.data[i] == hex_byte(mac + 2 * i))
			i++;
		found = i == 6 ? number : 0;
	}
	close(fd);
	return found;
}

/* It comes when the host plugs it, and the kernel tells of that. */
static uint32_t await_interface(const char *mac, int links, int64_t end)
{
	char sentence[128];
	uint32_t found;

	join(sentence, sizeof sentence, "there is no network interface ", mac,
	     ": the kernel needs its driver, xen-netfront", NULL);
	while (!(found = find_interface(mac)))
		await_event(links, -1, end, sentence);
	return found;
}

/*
 * Sends a message, in hexadecimal with "@" for the interface's number, and dies if the kernel's answer is no.  Returns
 * -1 if another interface has the name that this one is to get.
 */
static int send_message(int netlink, const char *hex, uint32_t interface)
{
	char message[XS_PAYLOAD_MAX / 2 + sizeof interface];
	struct { struct nlmsghdr header; struct nlmsgerr error; char more[sizeof message]; } answer;
	size_t len = 0;

	for (const char *c = hex; *c && len + sizeof interface <= sizeof message;) {
		if (*c == '@') {
			memcpy(message + len, &interface, sizeof interface);
			len += sizeof interface;
			c++;
		} else {
			message[len++] = hex_byte(c);
			c += 2;
		}
	}
	check(send(netlink, message, len, 0), "send rtnetlink message", hex);
	check(recv(netlink, &answer, sizeof answer, 0), "get the answer to rtnetlink message", hex);
	if (answer.error.error == -EEXIST && answer.error.msg.nlmsg_type == RTM_NEWLINK)
		return -1;
	if (answer.error.error)
		refuse(-answer.error.error, "apply rtnetlink message", hex);
	return 0;
}

static int open_netlink(int flags, uint32_t groups)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = groups };
	int fd = check(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | flags, NETLINK_ROUTE), "open", "rtnetlink");

	check(bind(fd, (struct sockaddr *)&address, sizeof address), "bind", "rtnetlink");
	return fd;
}

/*
 * data/network/0, 1, ... in this order: a MAC address, then words that are messages, or files below /proc with what is
 * to be written to them: "sys/net/..=1".
 */
int net_main(void)
{
	int netlink = open_netlink(0, 0), links = open_netlink(SOCK_NONBLOCK, RTMGRP_LINK);
	int proc = check(open("/proc", O_PATH | O_CLOEXEC), "open", "/proc");
	int64_t end = in_seconds(INTERFACE_WAIT);
	char path[64], text[XS_REPLY_MAX], *value;

	for (unsigned long number = 0;; number++) {
		join(path, sizeof path, "data/network/", decimal(number), NULL);
		if (xs_request(XS_READ, path, "", text) < 0)
			return 0;
		uint32_t interface = await_interface(strtok(text, " "), links, end);
		for (char *word; (word = strtok(NULL, " "));) {
			if (!(value = strchr(word, '='))) {
				while (send_message(netlink, word, interface) < 0)	/* it is about to go */
					await_event(links, -1, end, "an interface that is gone keeps its name");
			} else {
				*value++ = 0;
				write_at(proc, word, value);	/* what this kernel has not, it need not be told */
			}
		}
	}
}
